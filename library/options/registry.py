"""All groups of flags, in the order of `--help`, and the frozen result that a script gets."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict

from library.options.dataset import Caching, Dataset
from library.options.flags import Flag, Group, flags_of
from library.options.model import Model
from library.options.network import Network
from library.options.optimizer import Optimizer
from library.options.output import Hub, Output
from library.options.reporting import Config, Logging, Processes, Sampling
from library.options.training import Loss, Training
from library.options.values import written

GROUPS: Mapping[str, type[Group]] = MappingProxyType(
    {
        "config": Config,
        "model": Model,
        "dataset": Dataset,
        "caching": Caching,
        "network": Network,
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


class Options(BaseModel):
    """Every option of a run, checked. One attribute per group; flags are attributes of their group.

    Attributes:
        explicit: names of the flags that the user set, on the command line or in the config file.
        notices: lines to show to the user, in order.
        places: for each explicit flag the place where it was set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    config: Config = Config()
    model: Model = Model()
    dataset: Dataset = Dataset()
    caching: Caching = Caching()
    network: Network = Network()
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
        """Every flag but secrets, with its value as JSON holds it: paths as text, tuples as lists."""
        return {name: written(self.value(name)) for name, flag in FLAGS.items() if not flag.secret}
