"""Sparse training: methods that change masks inside one training. Each is one small file.

`SparseTraining` puts a method on a model; its weights stay as trained, not rewound. Another package
adds a method with an entry point of the group ``lth_plugins.methods``, or ``METHODS.register``.
"""

from lth_plugins.pruning.methods.method import Method, Snapshot, Update
from lth_plugins.pruning.methods.table import METHODS, make_method, options_of
from lth_plugins.pruning.methods.training import SparseTraining

__all__ = ["METHODS", "Method", "Snapshot", "SparseTraining", "Update", "make_method", "options_of"]
