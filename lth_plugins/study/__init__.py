"""Studies of tickets: many trainings, a verdict with evidence, and a report as one HTML file.

- `plan`: a configuration becomes runs of the tools, in order.
- `run`: each run is executed once, and its state is read back.
- `judge`: which tickets match their dense network.
- `analyse`: what masks have in common, and what they leave of a network.
- `report`: tables, figures, and the HTML that shows them.

Each imports only those above it. Importing this package imports none of the frameworks.
"""
