"""Loading what `lth_plugins.compact` has narrowed, with detectron2's own checkpointer."""

from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from lth_plugins.compact import narrow_to


class CompactCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, which gives the model the widths of a compacted checkpoint first.

    To evaluate: an optimizer that was made before the loading has the wide parameters. All else,
    checkpoints that are not compacted included, is as in ``DetectionCheckpointer``, which would
    leave out the convolutions that do not fit.
    """

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        narrow_to(self.model, checkpoint["model"])
        return super()._load_model(checkpoint)
