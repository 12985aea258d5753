"""What a transfer is configured by: YAML files, and ``key=value`` on the command line.

What changes the result is the *recipe*; a folder is only resumed with the recipe it was started
with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from lth_plugins.config import read_config
from lth_plugins.errors import ConfigError
from lth_plugins.pruning.search.settings import SearchSettings
from lth_plugins.resilience.recipe import file_digest, recipe_of
from lth_plugins.settings import setting
from lth_plugins.training.settings import Data as TrainingData
from lth_plugins.training.settings import Phase, TrainingConfig, method_of

MODES = ("finetune", "linear")
STEMS = ("standard", "small")


@dataclass
class Data(TrainingData):
    """What is trained on. ``name`` is a name in `data.SOURCES`."""

    download: bool = setting(False, recipe=False)  # let torchvision download what is not in root


@dataclass
class Training(Phase):
    """How long and how fast to train."""

    milestones: list[int] = setting(factory=list)  # epochs after which lr is divided by 10


@dataclass
class TransferConfig(SearchSettings, TrainingConfig):
    """Everything that `run.classify` needs, besides the settings of all searches and trainings.

    ``arch`` is the ticket's. ``rounds`` of 1 or more finds task-specific tickets by IMP.
    """

    # A path, a catalog name or hf://owner/repo[/file][@sha256:…]. The recipe has its digest.
    ticket: str = setting(recipe=False)
    # Another ticket, whose θ to train under this one's masks.
    weights: str | None = setting(None, recipe=False)
    load_weights: bool = True  # False: the masks over a random initialisation
    reverse: bool = False  # the weights that the ticket prunes
    random: bool = False  # a random mask of the ticket's layer-wise densities, from the seed
    ticket_digest: str | None = None  # if given, the ticket's digest has to be this
    # A run's model.safetensors: start from its weights, head and stem too.
    start: str | None = setting(None, recipe=False)
    # A run's model.safetensors, of a dense network: learn its logits, too.
    teacher: str | None = setting(None, recipe=False)
    mode: str = setting("finetune", choices=MODES)
    # small is 3x3, stride 1, no pooling, and not the ticket's.
    stem: str = setting("standard", choices=STEMS)
    # linear: batches that BN statistics are re-estimated on; 0 keeps them.
    precise_bn: int = setting(200, least=0, recipe=lambda c: c.mode == "linear")
    # Of rewind=early: after this fraction of the first training.
    rewind_at: float = setting(0.05, above=0, below=1, recipe=lambda c: c.rewind == "early")
    data: Data = setting(factory=Data)
    training: Training = setting(factory=Training)

    def check(self) -> None:
        super().check()
        self.check_teacher()
        linear = self.mode == "linear"
        method_of(self, {f"rounds={self.rounds}": self.rounds > 0, "mode=linear": linear})
        training, drops = self.training, self.training.milestones
        if self.rewind == "none" and training.schedule != "constant":
            raise ConfigError(
                "rewind=none trains on at the last learning rate, and that of training.schedule="
                f"{training.schedule} is 0: give training.schedule=constant"
            )
        rising = sorted(set(drops)) == drops
        if drops and not (rising and drops[0] > 0 and drops[-1] < training.epochs):
            raise ConfigError(
                f"expected training.milestones to rise and lie between 0 and training.epochs="
                f"{training.epochs}, found {drops}: give others, or none (training.milestones=[])"
            )
        if drops and training.schedule != "constant":
            raise ConfigError(
                f"training.milestones={drops} and training.schedule={training.schedule} "
                "contradict: give schedule=constant to divide lr at milestones, or milestones=[]"
            )
        if self.mode == "linear" and self.stem == "small":
            raise ConfigError(
                "mode=linear with stem=small would freeze a stem that is not the ticket's but "
                "random: give stem=standard, and data.size=224 for small images"
            )
        if self.mode == "linear" and self.teacher is not None:
            raise ConfigError(
                "mode=linear trains a head on features that were computed before, and a teacher "
                "looks at images: give mode=finetune, or leave out teacher"
            )
        if self.rounds > 0:
            self._check_search()

    def _check_search(self) -> None:
        if self.reverse or self.random or not self.load_weights:
            raise ConfigError(
                "rounds finds tickets from a dense ticket's weights, and reverse, random or "
                "load_weights=false is something else: give one of the two"
            )
        if self.start is not None:
            raise ConfigError(
                "rounds finds tickets from a dense ticket's weights, and start gives others: "
                "give one of the two"
            )
        if self.mode == "linear":
            raise ConfigError(
                "rounds finds tickets by the weights that training changes, and mode=linear "
                "changes none of them: give mode=finetune"
            )


def load_config(path: str | PathLike[str], overrides: Sequence[str] = ()) -> TransferConfig:
    """Read a transfer's configuration and check it, as `read_config` does."""
    return read_config(TransferConfig, path, overrides)


def recipe(config: TransferConfig) -> dict[str, Any]:
    """What the result depends on: no paths, no devices. The ticket is there by its digest."""
    files = {"start": config.start, "teacher": config.teacher}
    digests = {key: file_digest(path, key) for key, path in files.items() if path}
    searches = {"searches": True} if config.rounds > 0 else {}  # another kind of folder
    return {**recipe_of(config), **digests, **searches}
