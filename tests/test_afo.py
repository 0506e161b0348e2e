"""afo.py against torch.optim and a float64 copy of Algorithm 2 of arXiv 2003.00295."""

import copy
import io
import math

import numpy as np
import pytest
import torch

from afo import OURS, _step_in_torch, make_optimizer, make_scheduler


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def walk(optimizer, x: torch.nn.Parameter, updates) -> list[list[float]]:
    """Step on each averaged update Delta; return where x went."""
    path = []
    for delta in updates:
        x.grad = -torch.as_tensor(delta, dtype=x.dtype, device=x.device)
        optimizer.step()
        path.append(x.tolist())
    return path


def run(name: str, start, updates, **settings) -> list[list[float]]:
    x = torch.nn.Parameter(torch.as_tensor(start, dtype=torch.float32).clone())
    return walk(make_optimizer(name, x, **settings), x, updates)


def random_updates(count: int, size: int = 50, seed: int = 0) -> torch.Tensor:
    """float64 [count, size], of very different sizes from coordinate to coordinate."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-4, 1, size, dtype=torch.float64)
    return scales * torch.randn(count, size, generator=generator, dtype=torch.float64)


# --- FedAvg, FedAvgM ----------------------------------------------------------------------------


def test_fedavg_adds_the_update_bit_for_bit():
    start, (delta,) = torch.randn(1000), random_updates(1, 1000).float()
    assert torch.equal(torch.tensor(run("FedAvg", start, [delta])[0]), start + delta)


def test_fedavg_scales_the_update_by_lr():
    assert run("FedAvg", [1.0, 2.0], [[4.0, -8.0]], lr=0.25) == [[2.0, 0.0]]


def test_fedavgm_by_hand():
    # u = 0.5 * u + Delta: 4, 3, 1.5; x += 0.25 * u
    updates = [[4.0], [1.0], [0.0]]
    assert run("FedAvgM", [0.0], updates, lr=0.25, momentum=0.5) == [[1.0], [1.75], [2.125]]
    # Nesterov: x += 0.25 * (Delta + 0.5 * u) = 0.25 * (6, 2.5, 0.75)
    nesterov = run("FedAvgM", [0.0], updates, lr=0.25, momentum=0.5, nesterov=True)
    assert nesterov == [[1.5], [2.125], [2.3125]]
    # defaults: lr 1, momentum 0.9
    assert run("FedAvgM", [0.0], [[1.0], [0.0]])[1] == pytest.approx([1.9])


@pytest.mark.parametrize("nesterov", [False, True])
def test_fedavgm_is_torch_sgd(nesterov):
    updates = random_updates(20).float()
    theirs = torch.nn.Parameter(torch.ones(50))
    sgd = torch.optim.SGD([theirs], lr=0.3, momentum=0.7, nesterov=nesterov)
    path = walk(sgd, theirs, updates)
    ours = run("FedAvgM", torch.ones(50), updates, lr=0.3, momentum=0.7, nesterov=nesterov)
    assert ours == path


# --- FedExP -------------------------------------------------------------------------------------


def walk_fedexp(optimizer, x: torch.nn.Parameter, rounds) -> list[list[float]]:
    """Step on the mean of each round's updates [clients, n]; return where x went."""
    path = []
    for updates in rounds:
        mean_squared_norm = float(updates.square().sum(1).mean())
        optimizer.param_groups[0]["mean_squared_norm"] = mean_squared_norm
        path += walk(optimizer, x, [updates.mean(0)])
    return path


def test_fedexp_by_hand():
    x = torch.nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer("FedExP", x, eps=1.0)
    # (6, 2) and (-4, -2): mean (1, 0), squared norms 40 and 20, lr = 30 / (2 * (1 + 1)) = 7.5
    # (3, 4) twice: lr = 25 / (2 * (25 + 1)) < 1, so 1
    rounds = torch.tensor([[[6.0, 2.0], [-4.0, -2.0]], [[3.0, 4.0], [3.0, 4.0]]])
    assert walk_fedexp(optimizer, x, rounds[:1]) == [[7.5, 0.0]]
    assert optimizer.param_groups[0]["lr"] == 7.5
    assert walk_fedexp(optimizer, x, rounds[1:]) == [[10.5, 4.0]]
    assert optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("settings", [{}, {"eps": 0.1}])
def test_fedexp_follows_the_paper(settings):
    """Updates of 1000 to 0.01 about a shared one, so that eps and the maximum are both felt."""
    scales = torch.logspace(3, -2, 20, dtype=torch.float64).view(20, 1, 1)
    rounds = scales * (random_updates(20 * 8).view(20, 8, 50) + random_updates(1, seed=1))
    eps, x, expected, rates = settings.get("eps", 1e-3), np.zeros(50), [], []
    for updates in rounds.numpy():
        mean = updates.mean(0)
        rates.append(max(1, np.sum(updates**2) / (2 * 8 * (np.sum(mean**2) + eps))))
        x = x + rates[-1] * mean
        expected.append(x)
    parameter = torch.nn.Parameter(torch.zeros(50))
    path = walk_fedexp(make_optimizer("FedExP", parameter, **settings), parameter, rounds)
    np.testing.assert_allclose(path, expected, rtol=1e-5, atol=1e-3)
    assert min(rates) == 1 < max(rates)


def test_fedexp_whose_clients_agree_is_fedavg():
    x = torch.nn.Parameter(torch.randn(50))
    start, updates = x.detach().clone(), random_updates(10).float()
    path = walk_fedexp(make_optimizer("FedExP", x), x, updates.unsqueeze(1).expand(10, 4, 50))
    assert path == run("FedAvg", start, updates)


@pytest.mark.parametrize("size", [0, 1, 32766, 32767, 32768, 65534, 65535])
def test_fedexp_reads_the_whole_vector(size):
    """The norm is summed in blocks of 32767."""
    x = torch.nn.Parameter(torch.zeros(size))
    optimizer = make_optimizer("FedExP", x, eps=1.0)
    optimizer.param_groups[0]["mean_squared_norm"] = 1e6
    updates = torch.randn(1, size)
    walk(optimizer, x, updates)
    norm = np.sum(updates.double().numpy() ** 2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(max(1, 5e5 / (norm + 1)), rel=2e-6)


def test_fedexp_takes_no_scheduler():
    optimizer = make_optimizer("FedExP", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match="FedExP sets its own learning rate"):
        make_scheduler("StepLR", optimizer, step_size=1)


# --- FedAdagrad, FedAdam, FedAMS, FedYogi by hand -------------------------------------------------
# All with lr 2, beta1 = 0.5, tau = 1, x0 = 0, so that x += 2 * m / (sqrt(v) + 1).


def test_fedadagrad_by_hand():
    # Delta 3:  m = 1.5,                 v = 16 + 9 = 25,    x = 2 * 1.5 / 6 = 0.5
    # Delta 12: m = 0.75 + 6 = 6.75,     v = 25 + 144 = 169, x = 0.5 + 13.5 / 14
    settings = dict(lr=2.0, beta1=0.5, tau=1.0, v0=16.0)
    path = run("FedAdagrad", [0.0], [[3.0], [12.0]], **settings)
    assert np.ravel(path) == pytest.approx([0.5, 0.5 + 13.5 / 14], rel=1e-6)


def test_fedadam_by_hand():
    # Delta 7: m = 3.5,                  v = 0.5 * 1 + 0.5 * 49 = 25,     x = 7 / 6
    # Delta 5: m = 1.75 + 2.5 = 4.25,    v = 12.5 + 12.5 = 25,            x = 7 / 6 + 8.5 / 6
    settings = dict(lr=2.0, beta1=0.5, beta2=0.5, tau=1.0, v0=1.0)
    path = run("FedAdam", [0.0], [[7.0], [5.0]], **settings)
    assert np.ravel(path) == pytest.approx([7 / 6, 15.5 / 6], rel=1e-6)


def test_fedyogi_by_hand():
    # beta2 = 0.75, v0 = 5. Three coordinates, for the three signs of v - Delta^2.
    # Delta 4: Delta^2 = 16 > 5:   v = 5 + 0.25 * 16 = 9,  m = 2,   x = 4 / 4 = 1
    # Delta 2: Delta^2 = 4 < 5:    v = 5 - 0.25 * 4 = 4,   m = 1,   x = 2 / 3
    # Delta 0: Delta^2 = 0:        v = 5,                  m = 0,   x = 0
    # Delta 3: Delta^2 = 9 = 9:    v = 9,                  m = 2.5, x = 1 + 5 / 4
    # Delta 0: Delta^2 = 0:        v = 4,                  m = 0.5, x = 2 / 3 + 1 / 3
    # Delta -4: Delta^2 = 16 > 5:  v = 9,                  m = -2,  x = -1
    settings = dict(lr=2.0, beta1=0.5, beta2=0.75, tau=1.0, v0=5.0)
    updates = [[4.0, 2.0, 0.0], [3.0, 0.0, -4.0]]
    path = run("FedYogi", [0.0] * 3, updates, **settings)
    assert path[0] == pytest.approx([1, 2 / 3, 0], rel=1e-6)
    assert path[1] == pytest.approx([2.25, 1, -1], rel=1e-6)


def test_fedams_by_hand():
    # tau = 0, so that x += 2 * m / sqrt(v_max); beta2 = 0.5, v0 = 8
    # Delta 4:  m = 2,    v = 8,    v_max = 8,  x = 4 / sqrt(8)
    # Delta 8:  m = 5,    v = 36,   v_max = 36, x += 10 / 6
    # Delta 0:  m = 2.5,  v = 18,   v_max = 36, x += 5 / 6
    # and a coordinate that v0 holds: Delta 2, v = 2 then 1, 0.5; m = 1, 0.5, 0.25
    settings = dict(lr=2.0, beta1=0.5, beta2=0.5, tau=0.0, v0=8.0)
    path = run("FedAMS", [0.0, 0.0], [[4.0, 2.0], [8.0, 0.0], [0.0, 0.0]], **settings)
    first, held = 4 / math.sqrt(8), 2 / math.sqrt(8)
    assert path[0] == pytest.approx([first, held], rel=1e-6)
    assert path[1] == pytest.approx([first + 10 / 6, 1.5 * held], rel=1e-6)
    assert path[2] == pytest.approx([first + 15 / 6, 1.75 * held], rel=1e-6)


# --- FedAdagrad, FedAdam, FedAMS, FedYogi against Algorithm 2 -------------------------------------


def algorithm_2(name, start, updates, lr, beta1, tau, beta2=0, v0=None, bias_correction=False):
    """Algorithm 2 of the paper in float64, one coordinate after the other."""
    path, x = [], [float(value) for value in start]
    m = [0.0] * len(x)
    v = [tau**2 if v0 is None else v0] * len(x)
    v_max, v = (v, [0.0] * len(x)) if name == "FedAMS" else (None, v)
    for t, delta in enumerate(updates.tolist(), start=1):
        for i, d in enumerate(delta):
            m[i] = beta1 * m[i] + (1 - beta1) * d
            if name == "FedAdagrad":
                v[i] = v[i] + d**2
            elif name == "FedYogi":
                sign = (v[i] > d**2) - (v[i] < d**2)
                v[i] = v[i] - (1 - beta2) * d**2 * sign
            else:
                v[i] = beta2 * v[i] + (1 - beta2) * d**2
            first = m[i] / (1 - beta1**t) if bias_correction else m[i]
            if name == "FedAMS":  # with the maximum as in arXiv 2205.02719
                v_max[i] = max(v_max[i], v[i])
            second = v_max[i] if name == "FedAMS" else v[i]
            second = second / (1 - beta2**t) if bias_correction else second
            x[i] += lr * first / (math.sqrt(second) + tau)
        path.append(list(x))
    return np.array(path)


VARIANTS = [("FedAdagrad", {})] + [
    (name, dict(beta2=0.95, bias_correction=corrected))
    for name in ("FedAdam", "FedAMS", "FedYogi")
    for corrected in (False, True)
]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
@pytest.mark.parametrize("tau", [1e-3, 0.5])
@pytest.mark.parametrize("v0", [None, 0.0, 0.3])
def test_adaptive_optimizers_follow_algorithm_2(name, variant, tau, v0):
    settings = dict(lr=0.05, beta1=0.8, tau=tau, v0=v0) | variant
    updates = random_updates(30)
    expected = algorithm_2(name, [0.1] * 50, updates, **settings)
    path = run(name, [0.1] * 50, updates, **settings)
    np.testing.assert_allclose(path, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("FedAdagrad", dict(lr=0.1, beta1=0.0, tau=1e-2)),
        ("FedAdam", dict(lr=1e-2, beta1=0.9, beta2=0.99, tau=1e-3)),
        ("FedAMS", dict(lr=1.0, beta1=0.9, beta2=0.99, tau=0.0, v0=1e-3)),
        ("FedYogi", dict(lr=1e-2, beta1=0.9, beta2=0.99, tau=1e-3)),
    ],
)
def test_the_defaults_are_those_of_the_paper(name, defaults):
    """v0 = tau^2 and the best rates for CIFAR-10; small updates, so that v0 and tau are felt."""
    updates = 1e-3 * random_updates(5)
    expected = algorithm_2(name, [0.0] * 50, updates, **defaults)
    np.testing.assert_allclose(run(name, [0.0] * 50, updates), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("tau", [1e-8, 1e-2])
def test_bias_corrected_fedadam_without_v0_is_torch_adam(dtype, rtol, tau):
    """Adam's step is lr * m' / (sqrt(v') + eps), m' and v' corrected: eps is tau, unchanged."""
    updates = random_updates(50)
    theirs = torch.nn.Parameter(torch.ones(50, dtype=dtype))
    ours = torch.nn.Parameter(torch.ones(50, dtype=dtype))
    adam = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.99), eps=tau)
    fedadam = make_optimizer("FedAdam", ours, lr=0.01, tau=tau, v0=0.0, bias_correction=True)
    np.testing.assert_allclose(
        walk(fedadam, ours, updates), walk(adam, theirs, updates), rtol=rtol, atol=rtol
    )


@pytest.mark.parametrize("tau", [1e-8, 1e-2])
def test_bias_corrected_fedams_without_v0_is_torch_amsgrad(tau):
    """torch stabilizes as FedAdam does: eps is tau, and v_max starts at 0."""
    updates = random_updates(50) * torch.linspace(2, 0.1, 50).view(-1, 1)  # so that v falls
    theirs = torch.nn.Parameter(torch.ones(50))
    ours = torch.nn.Parameter(torch.ones(50))
    adam = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.99), eps=tau, amsgrad=True)
    fedams = make_optimizer("FedAMS", ours, lr=0.01, tau=tau, v0=0.0, bias_correction=True)
    np.testing.assert_allclose(
        walk(fedams, ours, updates), walk(adam, theirs, updates), rtol=2e-6, atol=2e-6
    )


ADAPTIVE = ("FedAdagrad", "FedAdam", "FedAMS", "FedYogi")


@pytest.mark.parametrize("name", [name for name in OURS if name != "FedExP"])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 1000])
def test_vectors_of_any_size(name, size):
    """Each value goes where it would go alone, bit for bit: machine code works on 8 or 16."""
    updates = random_updates(3, 40).float()
    alone = run(name, torch.ones(40), updates)
    places = torch.arange(size) % 40
    whole = run(name, torch.ones(size), updates[:, places])
    assert torch.equal(torch.tensor(whole), torch.tensor(alone)[:, places])


@pytest.mark.parametrize("name", [name for name in ADAPTIVE if name != "FedAdagrad"])
@pytest.mark.parametrize("corrected", [False, True])
def test_other_devices_take_the_same_steps(name, corrected, monkeypatch):
    """What runs on CUDA, run here on the CPU."""
    updates = random_updates(20)
    compiled = run(name, torch.ones(50), updates, bias_correction=corrected)

    def in_torch(rule, *arguments):
        vectors, settings = arguments[:5], [float(value) for value in arguments[5:]]
        _step_in_torch(rule, *map(torch.from_numpy, vectors), *settings)

    monkeypatch.setattr("afo._step_compiled", in_torch)
    path = run(name, torch.ones(50), updates, bias_correction=corrected)
    np.testing.assert_allclose(path, compiled, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", OURS)
def test_cuda_takes_the_same_steps(name):
    updates = random_updates(20).float()
    x = torch.nn.Parameter(torch.ones(50, device="cuda"))
    path = walk(make_optimizer(name, x), x, updates)
    np.testing.assert_allclose(path, run(name, torch.ones(50), updates), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OURS)
def test_a_step_does_not_depend_on_the_number_of_threads(name):
    """Bit for bit, with more values than torch gives to one thread (32768), and again."""
    updates, threads, ends = random_updates(3, 100_003).float(), torch.get_num_threads(), []
    mean_squared_norm = 3 * float(updates[0].norm()) ** 2  # FedExP's rate is not 1
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            x = torch.nn.Parameter(torch.ones(100_003))
            optimizer = make_optimizer(name, x)
            optimizer.param_groups[0]["lr"] = 0.3
            if name == "FedExP":
                optimizer.param_groups[0]["mean_squared_norm"] = mean_squared_norm
            walk(optimizer, x, updates)
            ends.append(x.detach())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[1], ends[2])


def test_learning_rate_is_read_at_each_step():
    x = torch.nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer("FedAdam", x, lr=1.0)
    optimizer.param_groups[0]["lr"] = 0.0
    assert walk(optimizer, x, [[1.0]]) == [[0.0]]


@pytest.mark.parametrize("name", OURS)
def test_a_vector_without_a_gradient_is_left_alone(name):
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(name, x)
    optimizer.step()
    assert x.tolist() == [1.0] * 3 and not optimizer.state_dict()["state"]


@pytest.mark.parametrize("name", OURS)
def test_a_step_does_not_change_the_gradient(name):
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(name, x)
    for _ in range(2):
        x.grad = torch.tensor([1.0, -2.0, 0.0])
        optimizer.step()
        assert x.grad.tolist() == [1.0, -2.0, 0.0]


# --- by name ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OURS, "Adam", "SGD", "Adagrad", "RMSprop", "AdamW", "NAdam"])
def test_the_state_goes_on_bit_for_bit_after_a_checkpoint(name):
    settings = {"bias_correction": True} if name in ("FedAdam", "FedAMS", "FedYogi") else {}
    updates = random_updates(12).float()
    whole = run(name, torch.ones(50), updates, **settings)

    x = torch.nn.Parameter(torch.ones(50))
    optimizer = make_optimizer(name, x, **settings)
    assert walk(optimizer, x, updates[:5]) == whole[:5]
    file = io.BytesIO()
    torch.save({"x": x.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    again = torch.nn.Parameter(state["x"])
    other = make_optimizer(name, again, **settings)
    other.load_state_dict(state["optimizer"])
    assert walk(other, again, updates[5:]) == whole[5:]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("SGD", {"lr": 0.1}), ("Adam", {"betas": [0.8, 0.9]}), ("RMSprop", {"alpha": 0.5})],
)
def test_torch_optimizers_by_name(name, settings):
    updates = random_updates(5).float()
    theirs = torch.nn.Parameter(torch.zeros(50))
    path = walk(getattr(torch.optim, name)([theirs], **settings), theirs, updates)
    assert run(name, torch.zeros(50), updates, **settings) == path


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fedyogi", {}, "no optimizer is called 'fedyogi'; did you mean 'FedYogi'?"),
        ("FedAdm", {}, "no optimizer is called 'FedAdm'; did you mean 'FedAdam'?"),
        ("adamw", {}, "no optimizer is called 'adamw'; did you mean 'AdamW'?"),
        ("qqqqqq", {}, "no optimizer is called 'qqqqqq'; such as FedAvg"),
        ("Optimizer", {}, "no optimizer is called 'Optimizer'"),
        ("FedAvg", {"momentum": 0.9}, "FedAvg has no setting 'momentum'; it has lr"),
        ("FedAdagrad", {"beta2": 0.9}, "FedAdagrad has no setting 'beta2'; it has lr, beta1, tau"),
        ("FedAdam", {"params": 1}, "FedAdam has no setting 'params'"),
        ("Adam", {"beta1": 0.9}, "Adam has no setting 'beta1'; it has lr, betas, eps"),
        ("SGD", {"nesterov": True}, "SGD cannot be used: Nesterov momentum requires a momentum"),
        ("Adam", {"betas": 0.9}, "Adam cannot be used: "),
        ("LBFGS", {}, "LBFGS cannot be used: "),
        ("SparseAdam", {}, "SparseAdam cannot be used: SparseAdam does not support dense"),
    ],
)
def test_a_wrong_optimizer_is_one_line_with_a_hint(name, settings, message):
    x = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError) as error:
        make_optimizer(name, x, **settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert x.tolist() == [1.0] * 3 and x.grad is None


# --- schedulers -----------------------------------------------------------------------------------


def rates(scheduler: str, steps: int, **settings) -> list[float]:
    x = torch.nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer("FedAdam", x, lr=1.0)
    schedule = make_scheduler(scheduler, optimizer, **settings)
    path = []
    for _ in range(steps):
        path.append(optimizer.param_groups[0]["lr"])
        x.grad = torch.zeros(1)
        optimizer.step()
        schedule.step()
    return path


@pytest.mark.filterwarnings("error")  # torch warns of a schedule that is stepped out of turn
def test_torch_schedulers_by_name():
    assert rates("StepLR", 5, step_size=2, gamma=0.5) == [1.0, 1.0, 0.5, 0.5, 0.25]
    assert rates("MultiStepLR", 4, milestones=[1, 3], gamma=0.5) == [1.0, 0.5, 0.5, 0.25]
    cosine = rates("CosineAnnealingLR", 3, T_max=2)
    assert cosine == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("steplr", {}, "no scheduler is called 'steplr'; did you mean 'StepLR'?"),
        ("StepLR", {"size": 2}, "StepLR has no setting 'size'; it has step_size, gamma"),
        ("StepLR", {}, "StepLR cannot be used: "),  # no step_size
        ("StepLR", {"step_size": 0}, "StepLR cannot be used: "),  # fails when it is stepped
        ("LambdaLR", {}, "LambdaLR cannot be used: "),
        ("ReduceLROnPlateau", {}, "ReduceLROnPlateau cannot be used: "),  # wants a metric
        ("LRScheduler", {}, "no scheduler is called 'LRScheduler'"),
    ],
)
def test_a_wrong_scheduler_is_one_line_with_a_hint(name, settings, message):
    optimizer = make_optimizer("FedAvg", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError) as error:
        make_scheduler(name, optimizer, **settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_making_a_scheduler_leaves_the_optimizer_at_its_first_rate():
    optimizer = make_optimizer("FedAvg", torch.nn.Parameter(torch.ones(3)), lr=0.5)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    make_scheduler("ExponentialLR", optimizer, gamma=0.1)
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.state_dict()["state"] == before
