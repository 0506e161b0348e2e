"""The ways to sample by name: a new one is a class in a file of its own, and a line."""

from federation.oort import Oort
from federation.sampling import Uniform
from federation.tifl import TiFL

SAMPLERS: dict[str, type[Uniform]] = {"uniform": Uniform, "tifl": TiFL, "oort": Oort}
