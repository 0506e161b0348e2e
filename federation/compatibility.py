"""What goes with what: coders, algorithms and optimizers declare it, and one function compares.

A coder says whether it is unbiased, contractive, keeps norms, takes a selection and leaves a whole
model of use (compressors/coder.py); an algorithm (algorithms.py) and an optimizer (afo.py) say what
they need.
"""

from collections.abc import Iterator

from afo import OURS, check_local_optimizer
from algorithms import FedAvg, make_algorithm, pick
from compression import Coder, parse_coder
from config import Config, Downlink, Local, Selection, Submodel, Uplink
from federation.samplers import SAMPLERS


def contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, why not) for choices that do not exist or do not go together."""
    try:
        algorithm = make_algorithm(config.local.algorithm, **config.local.options)
    except ValueError as error:
        named = [key for key in config.local.options if key in str(error).split(";")[0]]
        yield f"local.options.{named[0]}" if named else "local.algorithm", str(error)
        return
    try:
        pick(config.schedule.sampling, SAMPLERS, "way to sample")
    except ValueError as error:
        yield "schedule.sampling", str(error)
    masked = config.pruning.mask.method != "none"
    up = config.uplink, config.pruning, "uplink", "pruning"
    down = config.downlink, config.downlink.pruning, "downlink", "downlink.pruning"
    for link, selection, name, section in (up, down):
        try:
            coder = parse_coder(link.values)
        except ValueError as error:
            yield f"{name}.values", str(error)
            return
        yield from _of_a_direction(link, coder, selection, name, section, masked)
    if config.downlink.mode == "copies" and algorithm.down:
        why = "sends a vector besides the model, of which no copies are kept; use change"
        yield "downlink.mode", f"{config.local.algorithm} {why}"
    yield from _of_the_local_optimizer(config, algorithm)
    yield from _of_the_optimizer(config, algorithm)
    yield from _of_submodels(config, algorithm)
    if config.schedule.name == "gossip":
        yield from _of_gossip(config)
    else:
        yield from _of_error_feedback(config, algorithm)


def doubts(config: Config) -> Iterator[str]:
    """Yield what goes together, but rarely as a user hopes."""
    model, server = config.model, config.server
    averages = server.optimizer == "FedAvg" and server.lr in (None, 1.0)
    if config.schedule.name == "gossip" or config.local.steps == 1 or averages:
        return  # statistics and weights are of the same model
    if model.has_batch_norm and model.norm_policy == "average":
        yield (
            f"BatchNorm's statistics are those of the clients' average, and {server.optimizer} "
            "moves the model elsewhere: accuracies may be at chance for long; "
            "set model.norm_policy: static"
        )


def _of_a_direction(
    link: Uplink | Downlink,
    coder: Coder,
    selection: Selection,
    name: str,
    section: str,
    masked: bool,
) -> Iterator[tuple[str, str]]:
    if not coder.takes_selection and selection.method != "none":
        yield f"{name}.values", f"{link.values} needs whole tensors: {section}.method must be none"
    if not coder.takes_selection and masked:
        yield f"{name}.values", f"{link.values} needs whole tensors: pruning.mask.method none"
    if link.dense_below and selection.method == "random":
        yield f"{name}.dense_below", f"{section}.method random leaves no tensor whole"
    if isinstance(link, Uplink) and link.client_bits and coder.words.form != "eden({})":
        yield (
            f"{name}.client_bits",
            f"{link.values} has whole bits; it needs {name}.values: eden(R)",
        )
    whole_model = isinstance(link, Downlink) and link.mode == "model"
    remedy = "downlink.mode change or copies"
    if whole_model and selection.method != "none":
        yield f"{section}.method", f"a part of the model can be sent only in {remedy}"
    if whole_model and coder.ruins_models:
        yield f"{name}.values", f"{link.values} ruins a whole model: it needs {remedy}"


def _of_error_feedback(config: Config, algorithm: FedAvg) -> Iterator[tuple[str, str]]:
    """Which of them end beside the optimum, or run away from it: see tests/test_quadratics.py."""
    key, name, up = "uplink.error_feedback", config.local.algorithm, config.uplink
    coder = parse_coder(up.values)
    lossless = config.pruning.method == "none" and coder.variance == 0
    if up.error_feedback and algorithm.owes and not lossless:
        lost = up.values if config.pruning.method == "none" else config.pruning.method
        yield key, f"{name} itself makes up for what {lost} loses: it must be false"
    coarse = coder.ruins_models and not coder.unbiased
    if not up.error_feedback and coarse and not algorithm.updates_vanish:
        yield key, f"{up.values} errs alike each time, and {name} ends far off: it must be true"


def _of_gossip(config: Config) -> Iterator[tuple[str, str]]:
    """CHOCO-SGD makes up for any loss; what D-PSGD loses of a model is lost."""
    if config.schedule.gossip == "D-PSGD" and parse_coder(config.uplink.values).ruins_models:
        yield "uplink.values", f"{config.uplink.values} ruins a whole model: it needs CHOCO-SGD"


def _of_the_local_optimizer(config: Config, algorithm: FedAvg) -> Iterator[tuple[str, str]]:
    """Which keys it takes, and what needs SGD. Nothing that is set is ignored."""
    local, options = config.local, "local.optimizer_options"
    if local.optimizer == "SGD":
        for key in local.optimizer_options:
            yield f"{options}.{key}", "SGD takes local.lr, momentum, nesterov and weight_decay only"
        if local.optimizer_state != "fresh":
            yield "local.optimizer_state", "SGD begins anew in each round; set a local.optimizer"
        return
    try:
        check_local_optimizer(local.optimizer, local.lr, local.optimizer_options)
    except ValueError as error:
        named = [key for key in local.optimizer_options if key in str(error).split(";")[0]]
        yield f"{options}.{named[0]}" if named else "local.optimizer", str(error)
    for key in ("momentum", "nesterov", "weight_decay"):
        if getattr(local, key) != getattr(Local(), key):
            yield f"local.{key}", f"is SGD's; what {local.optimizer} takes stands in {options}"
    if algorithm.divides_by_length:
        why = "takes update / (lr x steps) for a mean gradient: it needs local.optimizer: SGD"
        yield "local.algorithm", f"{local.algorithm} {why}"
    if local.optimizer_state == "kept" and config.pruning.mask.method == "dynamic":
        yield "local.optimizer_state", "kept moments would move weights that left a dynamic mask"
    if local.optimizer_state == "kept" and config.schedule.name == "gossip":
        yield "local.optimizer_state", "gossip's nodes keep models alone; set it to fresh"
    if local.lanes not in ("auto", "1"):
        yield "local.lanes", f"{local.optimizer} trains one client at a time; use local.lanes: 1"
    if config.distributed.engine == "deepspeed":
        yield "local.optimizer", "DeepSpeed's engine takes SGD; use distributed.engine: accelerate"


def _of_the_optimizer(config: Config, algorithm: FedAvg) -> Iterator[tuple[str, str]]:
    """A name of torch.optim declares nothing, so it needs nothing."""
    name, key = config.server.optimizer, "server.optimizer"
    optimizer = OURS.get(name)
    if getattr(optimizer, "steps_by_average", False) and not algorithm.steps_by_average:
        yield key, f"{name} needs the updates' average; {config.local.algorithm} makes another step"
    if getattr(optimizer, "reads_norms", False):
        if config.schedule.name == "hierarchical":
            yield key, f"{name} needs the norms of updates, and edge servers send averages"
        scaled = config.pruning.method == "random" and not config.uplink.error_feedback
        if scaled or not parse_coder(config.uplink.values).keeps_norms:
            what = "a random choice" if scaled else config.uplink.values
            yield key, f"{name} would take the noise of {what} for progress; take another coder"


def _of_submodels(config: Config, algorithm: FedAvg) -> Iterator[tuple[str, str]]:
    """What slices of the network do not go with, and what belongs to them."""
    settings, model, name = config.submodel, config.model, config.schedule.name
    if model.norm_policy == "static" and model.has_batch_norm and name == "gossip":
        yield "model.norm_policy", "gossip scores every node's model: static is for one model"
    if not settings.widths:
        if settings != Submodel():
            yield "submodel.widths", "the other settings of submodel need widths, such as [1, 0.5]"
        return
    if settings.widths != sorted({1.0, *settings.widths}, reverse=True):
        yield "submodel.widths", f"{settings.widths} must begin with 1 and then go down"
    if settings.assignment == "capability" and config.schedule.deadline_seconds is None:
        yield "submodel.assignment", "capability fits widths to schedule.deadline_seconds: set it"
    if model.has_batch_norm and model.norm_policy != "static":
        yield "model.norm_policy", "statistics differ from width to width: it must be static"
    elif model.norm_policy == "local":
        yield "model.norm_policy", "norm layers of different widths are slices too: use average"
    remedy = "does not go with submodel.widths"
    if config.pruning.mask.method != "none":
        yield "pruning.mask.method", f"{config.pruning.mask.method} {remedy}: use none"
    if algorithm.has_vector or algorithm.up:
        yield "local.algorithm", f"{config.local.algorithm} {remedy}: use FedAvg, FedProx, FedNova"
    if name not in ("synchronous", "fedbuff"):
        yield "schedule.name", f"{name} {remedy}: use synchronous or fedbuff"
    if config.distributed.exchange != "gather":
        yield "distributed.exchange", f"{config.distributed.exchange} {remedy}: use gather"
    if config.distributed.engine == "deepspeed":
        yield "distributed.engine", f"deepspeed {remedy}: use auto or accelerate"
    if settings.ordered_dropout and config.local.lanes not in ("auto", "1"):
        yield "local.lanes", "ordered_dropout trains one client at a time; use local.lanes: 1"
