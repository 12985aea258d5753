"""The commands of `lth`, a module or a folder each. The scripts of tools/ run the same ones."""
