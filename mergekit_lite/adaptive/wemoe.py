r"""WEMoE: instead of one merge for all inputs, a merge for every input, made on the way through the network.

Tang et al., "Merging multi-task models via weight-ensembling mixture of experts", ICML 2024 (arXiv:2402.00433). One
set of coefficients must be a compromise between tasks. But a network sees its input before it has to commit itself.
So a few modules, in the paper the MLP of every transformer block, keep all task vectors, and a small *router* looks at
the module's input :math:`h` and says how much of each to use. For a module with weights :math:`\theta_0`,

.. math::
   w(h) = \frac{1}{T} \sum_{t=1}^{T} r(h_t) \in \mathbb{R}^K, \qquad
   \theta(h) = \theta_0 + \sum_k w_k(h)\, \tau_k, \qquad \text{output} = f_{\theta(h)}(h),

where the :math:`h_t` are the input's T tokens (in a convolutional network, the positions of its feature map). The
router r is Linear(d, d), ReLU, Linear(d, K), without a softmax. Its weights start small and its last bias at
:math:`\lambda = 0.3`, so that the first merge is task arithmetic; everything outside these modules is, and stays, task
arithmetic. Only the routers are trained, by the entropy of predictions for unlabelled inputs.

**The price.** The modules' weights are stored K + 1 times. Each input has weights of its own: K multiply-adds per
weight to form them, next to T to use them.

**Routing by image or by batch.** If w is averaged over a *batch*, as in the released training loop (where every batch
comes from one task), all its images share one merge, which is cheaper. Used that way on test batches of one task each,
it would tell the network which task it is looking at, through the other images. ``route="batch"`` is there to see what
this is worth; predictions for an image alone are those of ``route="image"``, the default. (In
the same authors' fusion-bench 0.2.33 the learning rate is constant, and the mixtures route by batch in the evaluation,
too.)
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mergekit_lite.adaptive.adaptation import Images, adapt, at_base, draws
from mergekit_lite.adaptive.history import History
from mergekit_lite.adaptive.losses import Head, Loss, entropy_loss, logits_of
from mergekit_lite.checkpoints import PathLike, SafetensorsFile, save
from mergekit_lite.checks import finite, positive
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors

ROUTES = ("image", "batch")
PER_CHUNK = 1 << 26  # numbers: so many merged weights are formed at a time


@method(
    name="WEMoE",
    paper="Tang et al., Merging multi-task models via weight-ensembling mixture of experts, ICML",
    arxiv="2402.00433",
    year=2024,
    need=Need.TEST_INPUTS,
)
def wemoe(
    tv: TaskVectors,
    model: nn.Module,
    heads: Mapping[str, Head],
    images: Images,
    *,
    modules: Sequence[str] | None = None,
    scale: float = 0.3,
    init: float = 0.3,
    steps: int = 1000,
    batch: int = 16,
    learning_rate: float = 1e-4,
    train_route: str = "image",
    loss: Loss = entropy_loss,
    generator: torch.Generator | None = None,
    measure: Callable[[nn.Module], Mapping[str, float]] | None = None,
    every: int = 50,
    patience: int | None = None,
    progress: bool = True,
) -> WEMoE:
    r"""Give some modules all task vectors and a router, and train the routers.

    Args:
        tv: K task vectors.
        model: a network that these weights fit; it is not changed.
        heads: by task, from the network's outputs to logits.
        images: inputs by task, as `draws` takes them.
        modules: names of the modules that merge for every input; by default all that are called ``mlp``.
        scale: :math:`\lambda` of the task arithmetic of everything else.
        init: of the routers' answers.
        steps: of Adam on the routers, with a learning rate that falls along half a cosine.
        batch: images per task and step.
        learning_rate: of the first step.
        train_route: ``"image"``, or ``"batch"`` as in the released training, which is cheaper.
        loss: what to descend on; the paper's is the entropy.
        generator: of the routers' first weights and the draws of images; by default one with seed 0.
        measure: accuracies by name of the network as it is, such as ``suite.evaluate``, for the history alone.
        every: how many steps apart they are measured.
        patience: stop as soon as the mean loss of the last so many steps is not below that of as many before.
        progress: show a progress bar.

    Returns:
        A network that takes inputs like `model`; its `history`.

    Raises:
        KeyError: a task has no head, or the network no module or tensor of some name.
        ValueError: no images, no modules, another route, or a number that makes no sense.
        DivergenceError: a loss or its gradient is not finite; `reached` has the network so far.
    """
    positive("learning_rate", learning_rate)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    batches = draws(images, batch, generator)
    network = WEMoE.start(tv, model, next(iter(next(batches).values())), modules, scale, init, generator)
    routers = [p for router in network.routers.values() for p in router.parameters()]
    optimizer = torch.optim.Adam(routers, lr=learning_rate)
    network.route = train_route

    def objective(inputs: Mapping[str, Tensor]) -> Mapping[str, float]:
        losses = {}
        for task, x in inputs.items():
            x = x.to(routers[0].device)
            value = loss(task, x, logits_of(task, x, network(x), heads))
            value.backward(inputs=routers)
            losses[task] = value.item()
        return losses

    def measure_by_image() -> Mapping[str, float]:
        assert measure is not None
        network.route = "image"
        measured = measure(network)
        network.route = train_route
        return measured

    def trained(history: History) -> WEMoE:
        network.route, network.history = "image", history
        return network

    history = adapt(
        optimizer,
        objective,
        batches,
        steps=steps,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps)),
        measure=None if measure is None else measure_by_image,
        every=every,
        patience=patience,
        progress=progress,
        reached=trained,
    )
    return trained(history)


class Mixture(nn.Module):
    """A module whose weights are merged anew for every input.

    Args:
        module: the module with the base's weights; kept, and used in inference mode.
        taus: by the name of a tensor of the module: its K task vectors, (K, *shape).
        router: from tokens (..., d) to K coefficients each, (..., K).
    """

    def __init__(self, module: nn.Module, taus: Mapping[str, Tensor], router: nn.Sequential) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.router = router
        self.route = "image"
        self._names = {name: f"taus_{name.replace('.', '/')}" for name in taus}  # buffers' names have no dots
        for name, buffer in self._names.items():
            self.register_buffer(buffer, taus[name])

    def forward(self, h: Tensor) -> Tensor:
        """The module's outputs for inputs (N, T, d), (N, d) or, as feature maps, (N, d, height, width)."""
        w = self.coefficients(h)
        if self.route == "batch":
            return self.with_weights(self.merged(w.mean(0, keepdim=True)), h)
        if torch.is_grad_enabled():
            # One image after another. In torch 2.13 vmap has wrong gradients where normalisation follows a convolution
            # whose weights differ by image; its values are right.
            return torch.cat([self.with_weights(self.merged(w[n : n + 1]), h[n : n + 1]) for n in range(len(h))])
        size = sum(getattr(self, buffer)[0].numel() for buffer in self._names.values())
        chunk = max(1, PER_CHUNK // max(1, size))
        each = vmap(lambda weights, x: functional_call(self.module, weights, (x[None],))[0])
        return torch.cat([each(self.merged(wi), hi) for wi, hi in zip(w.split(chunk), h.split(chunk), strict=True)])

    def with_weights(self, merged: Mapping[str, Tensor], h: Tensor) -> Tensor:
        """The module's outputs with one set of weights for all inputs, (1, *shape) each."""
        return torch.as_tensor(functional_call(self.module, {name: tensor[0] for name, tensor in merged.items()}, (h,)))

    def coefficients(self, h: Tensor) -> Tensor:
        """w: (N, K), the mean over tokens of what the router answers to each."""
        answers: Tensor = self.router(h.movedim(features_axis(self.module, h), -1))
        return answers.flatten(1, -2).mean(1) if answers.ndim > 2 else answers

    def merged(self, w: Tensor) -> dict[str, Tensor]:
        """The weights for coefficients (N, K), by name: (N, *shape)."""
        tensors = self.module.state_dict(keep_vars=True)
        merged = {}
        for name, buffer in self._names.items():
            tensor = tensors[name]
            # Through buffers, which are no parameters, torch may pass no gradient.
            share = w.to(tensor) if isinstance(tensor, nn.Parameter) else w.to(tensor).detach()
            merged[name] = tensor + torch.tensordot(share, getattr(self, buffer), dims=1)
        return merged


class WEMoE(nn.Module):
    """A network some of whose modules are mixtures. Made by `wemoe`, or `load`; evaluated like any network.

    Attributes:
        network: the model, with a `Mixture` in the place of each such module.
        mixtures: by the module's name.
        tasks: the names of the K task vectors.
        history: of the adaptation.
    """

    def __init__(self, network: nn.Module, mixtures: Mapping[str, Mixture], tasks: Sequence[str]) -> None:
        super().__init__()
        for name, mixture in mixtures.items():
            network.set_submodule(name, mixture)
        self.network, self.mixtures, self.tasks, self.history = network, dict(mixtures), list(tasks), History()
        self.eval()

    @classmethod
    def start(
        cls,
        tv: TaskVectors,
        model: nn.Module,
        inputs: Tensor,
        modules: Sequence[str] | None = None,
        scale: float = 0.3,
        init: float = 0.3,
        generator: torch.Generator | None = None,
    ) -> WEMoE:
        """The mixture before its routers are trained.

        Args:
            tv: K task vectors.
            model: a network that these weights fit; it is not changed.
            inputs: a few, to see how wide the modules' inputs are.
            modules: names of the modules that become mixtures; by default all that are called ``mlp``.
            scale: of the task arithmetic of everything else.
            init: the routers' last bias.
            generator: of the routers' weights; by default one with seed 0.

        Raises:
            KeyError: no module of some name, or a tensor that the network does not have.
            ValueError: no module is called ``mlp``; one stands inside of another, is not used, or has no task vectors.
        """
        finite("scale", scale)
        finite("init", init)
        network, where = at_base(model, tv), next(model.parameters())
        known = dict(network.named_modules())
        names = [n for n in known if n.split(".")[-1] == "mlp"] if modules is None else list(dict.fromkeys(modules))
        _check_modules(names, known)
        widths = _widths(network, names, inputs.to(where.device))
        owners = {tensor: next((n for n in names if tensor.startswith(n + ".")), None) for tensor in tv.tensor_names}
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        parameters = {tensor for tensor, _ in network.named_parameters()}
        for tensor, _, taus in tv.layers():
            owner = owners[tensor]
            if owner is not None and (tensor in parameters or taus.any()):  # buffers, only if experts changed them
                parts[owner][tensor.removeprefix(owner + ".")] = taus
        without = [name for name, taus in parts.items() if not taus]
        if without:
            raise ValueError(f"the task vectors have no tensor of the module '{without[0]}'.")
        outside = tv.map(lambda tensor, taus: (scale if owners[tensor] is None else 0.0) * taus.sum(0))
        network.load_state_dict(outside, strict=False)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        mixtures = {n: Mixture(known[n], parts[n], router(widths[n], len(tv), init, generator)) for n in names}
        return cls(network, mixtures, tv.names).to(where)

    @property
    def routers(self) -> dict[str, nn.Sequential]:
        """The routers by the module's name: all that is trained."""
        return {name: mixture.router for name, mixture in self.mixtures.items()}

    @property
    def route(self) -> str:
        """``"image"``: a merge for every image; ``"batch"``: one for the images of a batch."""
        return next(iter(self.mixtures.values())).route

    @route.setter
    def route(self, by: str) -> None:
        if by not in ROUTES:
            raise ValueError(f"route must be one of {', '.join(ROUTES)}; got '{by}'.")
        for mixture in self.mixtures.values():
            mixture.route = by

    def forward(self, inputs: Tensor) -> Tensor:
        """What the model would return, with weights of their own for all inputs."""
        return torch.as_tensor(self.network(inputs))

    @torch.no_grad()
    def routing(self, inputs: Tensor) -> dict[str, Tensor]:
        """What the routers answer: by module, (N, K)."""
        entered = entering(self.network, list(self.mixtures), inputs)
        return {name: mixture.coefficients(entered[name]) for name, mixture in self.mixtures.items()}

    def save(self, path: PathLike) -> None:
        """Write weights, task vectors and routers as safetensors."""
        facts = {"modules": list(self.mixtures), "tasks": self.tasks}
        save(self.network.state_dict(), path, {"wemoe": json.dumps(facts)})

    @classmethod
    def load(cls, path: PathLike, model: nn.Module) -> WEMoE:
        """Read what `save` wrote.

        Args:
            path: the file.
            model: the network as it was before; it is not changed.

        Raises:
            CheckpointError: the file cannot be read.
            ValueError: it holds no such mixture, or one of another network.
        """
        file = SafetensorsFile(path)
        if "wemoe" not in file.metadata:
            raise ValueError(f"'{path}' does not hold a mixture written by WEMoE.save.")
        facts = json.loads(file.metadata["wemoe"])
        network, mixtures = copy.deepcopy(model).eval().requires_grad_(False), {}
        try:
            for name in facts["modules"]:
                prefix = f"{name}.taus_"
                taus = {n.removeprefix(prefix).replace("/", "."): file[n].clone() for n in file if n.startswith(prefix)}
                width = file[f"{name}.router.0.weight"].shape[1]
                answers = router(width, len(facts["tasks"]), 0.0, torch.Generator())
                mixtures[name] = Mixture(network.get_submodule(name), taus, answers)
            loaded = cls(network, mixtures, facts["tasks"]).to(next(model.parameters()))
            loaded.network.load_state_dict({name: file[name] for name in file})
        except (AttributeError, RuntimeError) as problem:
            raise ValueError(f"'{path}' is a mixture of another network: {problem}") from problem
        return loaded


def router(width: int, tasks: int, init: float, generator: torch.Generator) -> nn.Sequential:
    """Linear(d, d), ReLU, Linear(d, K); weights of standard deviation 0.01, the last bias `init`."""
    first, last = (nn.utils.skip_init(nn.Linear, width, answers) for answers in (width, tasks))
    for linear, bias in ((first, 0.0), (last, init)):
        nn.init.normal_(linear.weight, std=0.01, generator=generator)
        nn.init.constant_(linear.bias, bias)
    return nn.Sequential(first, nn.ReLU(), last)


def features_axis(module: nn.Module, h: Tensor) -> int:
    """The axis of a module's input along which a token's d numbers lie: 1 in feature maps, else the last."""
    return 1 if h.ndim == 4 and any(p.ndim == 4 for p in module.parameters()) else -1


def _check_modules(names: Sequence[str], known: Mapping[str, nn.Module]) -> None:
    if not names:
        raise ValueError(
            "no module of this network is called 'mlp'; name those that shall merge for every input, such as "
            f"modules=[{next((repr(n) for n, m in known.items() if n and list(m.parameters())), '')}]."
        )
    for name in names:
        if not name or name not in known:
            raise KeyError(f"the network has no module '{name}'.")
        outer = next((other for other in names if name.startswith(other + ".")), None)
        if outer is not None:
            raise ValueError(f"'{name}' is a part of '{outer}', which is to be merged for every input as a whole.")


def _widths(network: nn.Module, names: Sequence[str], inputs: Tensor) -> dict[str, int]:
    """How many numbers each token has that enters a module: d, by module."""
    entered = entering(network, names, inputs[:1])
    unused = [name for name in names if name not in entered]
    if unused:
        raise ValueError(f"the network does not use its module '{unused[0]}'.")
    return {name: h.shape[features_axis(network.get_submodule(name), h)] for name, h in entered.items()}


@torch.no_grad()
def entering(network: nn.Module, names: Sequence[str], inputs: Tensor) -> dict[str, Tensor]:
    """What enters the modules of these names on the way of some inputs; a module that is not used is left out."""
    entered: dict[str, Tensor] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, arguments: entered.__setitem__(name, arguments[0])

    handles = [network.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    try:
        network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return entered
