"""All groups of flags, in the order of `--help`, and the frozen result that a script gets."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict

from library.options.dataset import Caching, Dataset
from library.options.embeddings import Embeddings
from library.options.flags import Flag, Group, flags_of
from library.options.model import Model
from library.options.network import Network
from library.options.optimizer import Optimizer
from library.options.output import Hub, Output
from library.options.reporting import Config, Logging, Processes, Sampling
from library.options.scripts import SCRIPTS, TRAIN_NETWORK
from library.options.training import Loss, Training
from library.options.values import written

GROUPS: Mapping[str, type[Group]] = MappingProxyType(
    {
        "config": Config,
        "model": Model,
        "dataset": Dataset,
        "caching": Caching,
        "network": Network,
        "embeddings": Embeddings,
        "training": Training,
        "optimizer": Optimizer,
        "loss": Loss,
        "output": Output,
        "sampling": Sampling,
        "logging": Logging,
        "hub": Hub,
        "processes": Processes,
    }
)
FLAGS: Mapping[str, Flag] = MappingProxyType(
    {flag.name: flag for name, model in GROUPS.items() for flag in flags_of(name, model)}
)


@cache
def flags_of_script(name: str) -> Mapping[str, Flag]:
    """The flags that the script `name` of library.options.scripts has, with its defaults, in the order of `--help`."""
    script = SCRIPTS[name]
    return MappingProxyType(
        {
            flag.name: replace(flag, default=script.defaults.get(flag.name, flag.default))
            for flag in FLAGS.values()
            if flag.group not in script.without and flag.name not in script.lacks
        }
    )


class Options(BaseModel):
    """Every option of a run, checked. One attribute per group; flags are attributes of their group.

    Attributes:
        script: name of the script whose options they are (library.options.scripts). Flags that it doesn't have are at
            their defaults.
        explicit: names of the flags that the user set, on the command line or in the config file.
        notices: lines to show to the user, in order.
        places: for each explicit flag the place where it was set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    script: str = TRAIN_NETWORK.name
    config: Config = Config()
    model: Model = Model()
    dataset: Dataset = Dataset()
    caching: Caching = Caching()
    network: Network = Network()
    embeddings: Embeddings = Embeddings()
    training: Training = Training()
    optimizer: Optimizer = Optimizer()
    loss: Loss = Loss()
    output: Output = Output()
    sampling: Sampling = Sampling()
    logging: Logging = Logging()
    hub: Hub = Hub()
    processes: Processes = Processes()
    explicit: frozenset[str] = frozenset()
    notices: tuple[str, ...] = ()
    places: dict[str, str] = {}

    def where(self, name: str) -> str:
        """Where the user set the flag `name`: `--seed`, or `config.toml:12 seed`; the flag itself if nowhere."""
        return self.places.get(name, f"--{name}")

    def value(self, name: str) -> Any:
        """The value of the flag `name`, whatever its group.

        Raises:
            KeyError: there is no such flag.
        """
        return getattr(getattr(self, FLAGS[name].group), name)

    def network_arguments(self) -> dict[str, str]:
        """`--network_args` as names and values."""
        pairs = (text.partition("=") for text in self.network.network_args or ())
        return {key.strip(): value.strip() for key, _, value in pairs}

    def effective(self) -> dict[str, object]:
        """Every flag of the script but secrets, with its value as JSON holds it: paths as text, tuples as lists."""
        flags = flags_of_script(self.script)
        return {name: written(self.value(name)) for name, flag in flags.items() if not flag.secret}
