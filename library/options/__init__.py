"""What a user may say, and whether it can be done: flags, config files, dataset files. Imports nothing heavy."""

from library.options.datasets import load_datasets
from library.options.parse import parse
from library.options.parser import setup_parser
from library.options.registry import Options
from library.options.specs import CaptionSpec, DatasetSpec, SubsetSpec

__all__ = ["CaptionSpec", "DatasetSpec", "Options", "SubsetSpec", "load_datasets", "parse", "setup_parser"]
