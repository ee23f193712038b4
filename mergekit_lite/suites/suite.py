"""A suite: one backbone, K tasks with frozen heads, a base and K experts. The lab's test bench."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergekit_lite.calibrated import Curvature, diagonal_fisher, input_grams, kfac
from mergekit_lite.linearization import Linearized
from mergekit_lite.suites.evaluation import Evaluation, compare
from mergekit_lite.suites.folders import list_of_folders, load_folder
from mergekit_lite.suites.heads import CosineHead, few_per_class, make_heads
from mergekit_lite.suites.networks import in_inference_mode, sum_of_gradients
from mergekit_lite.suites.preparation import as_inputs, recipe_for
from mergekit_lite.suites.recipe import Recipe
from mergekit_lite.suites.speed import keep_freed_memory, one_thread
from mergekit_lite.suites.splits import Split, Task, names_asked
from mergekit_lite.suites.vision import build_backbone, pick_device
from mergekit_lite.task_vectors import TaskVectors
from mergekit_lite.types import PathLike, StateDict

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EVALUATION_BATCH", "Evaluation", "Suite", "Weights", "WeightsByTask", "compare"]

# One set of weights for all tasks (the base's, if None), and one for each task.
Weights = Mapping[str, Tensor] | nn.Module | None
WeightsByTask = Mapping[str, StateDict]

# Images evaluated at a time; more of them are no faster and need more memory.
EVALUATION_BATCH = 50

T = TypeVar("T")


def _is_by_task(state: Weights | WeightsByTask) -> TypeGuard[WeightsByTask]:
    return isinstance(state, Mapping) and isinstance(next(iter(state.values()), None), Mapping)


@dataclass
class Suite:
    """Tasks, a shared backbone, a frozen head per task, a base and one expert per merged task.

    Attributes:
        name: of the suite.
        model: the backbone with the base's weights, images (N, 3, H, W) to features (N, c).
        tasks: the tasks that have experts, by name.
        heads: the frozen head of every task, held-out ones included.
        recipe: how images are prepared, heads made and experts trained.
        experts: the fine-tuned state dicts by task.
        held_out: tasks that are never merged, to measure what a merge does elsewhere.
        seed: of the fine-tuning of these experts.
        recorded: accuracies measured when the suite was built, ``recorded[split][row][task]``.
        device: where models are run.
    """

    name: str
    model: nn.Module
    tasks: dict[str, Task]
    heads: dict[str, CosineHead]
    recipe: Recipe
    experts: dict[str, StateDict] = field(default_factory=dict)
    held_out: dict[str, Task] = field(default_factory=dict)
    seed: int = 0
    recorded: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __repr__(self) -> str:
        return (
            f"Suite({self.name}, seed {self.seed}: {len(self.tasks)} tasks, {len(self.experts)} experts of "
            f"{sum(p.numel() for p in self.model.parameters()):,} parameters, on {self.device})"
        )

    # ---------------------------------------------------------------- models

    @cached_property
    def base(self) -> StateDict:
        """The base's weights, shared by all experts before they were fine-tuned."""
        return self.model.state_dict()

    @property
    def task_vectors(self) -> TaskVectors:
        """The base and the experts as task vectors, in the order of `tasks`.

        Raises:
            ValueError: no expert has been trained yet.
        """
        if not self.experts:
            raise ValueError(f"the suite '{self.name}' has no experts yet; train them with suite.finetune().")
        return TaskVectors(self.base, {name: self.experts[name] for name in self.tasks if name in self.experts})

    def build(self, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A fresh copy of the backbone with these weights (the base's by default).

        Raises:
            RuntimeError: keys or shapes do not fit the backbone; the message names them.
        """
        model = copy.deepcopy(self.model)
        if state is not None:
            model.load_state_dict(state)
        return model

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images (N, 1 or 3, H, W) as the backbone's input: floats (N, 3, resolution, resolution)."""
        return as_inputs(images.to(self.device), self.recipe)

    @torch.no_grad()
    def features(self, model: nn.Module, split: Split) -> Tensor:
        """Features (N, c) of all images of a split, of which there is one at least; the model is left as it was."""
        keep_freed_memory()
        with one_thread(), in_inference_mode(model):
            return torch.cat([model(self.prepare(batch.images)) for batch in split.batches(EVALUATION_BATCH)])

    def logits(self, model: nn.Module, task: str, split: Split) -> Tensor:
        """Logits (N, classes of the task) of all images of a split.

        Raises:
            ValueError: the features are not finite; the message names the task.
        """
        return self._read(task, self.features(model, split))

    def _read(self, task: str, features: Tensor) -> Tensor:
        """What a task's head makes of features, if these are numbers at all."""
        logits = self.heads[task](features)
        if not torch.isfinite(features).all() or not torch.isfinite(logits).all():
            raise ValueError(
                f"the network's answers to the images of '{task}' are not finite (NaN or infinite features). "
                "Its weights have diverged, or a normalisation layer's running variance became negative in merging: "
                "look at the weights, or merge with a smaller scale."
            )
        return logits

    # ---------------------------------------------------------------- evaluation

    def evaluate(
        self,
        state: Weights | WeightsByTask = None,
        *,
        split: str = "test",
        tasks: Iterable[str] | None = None,
    ) -> Evaluation:
        """Accuracy of one set of weights on the tasks, or of one for each task.

        Args:
            state: a state dict such as a merge returns, or a module; the base by default. A mapping from task names
                to state dicts (`experts`, a `TaskConditioned` merge) answers every task with its own weights: it is
                told which task an image belongs to.
            split: ``"validation"`` to choose anything by, ``"test"`` to report.
            tasks: names of tasks, held-out ones too; by default those that are merged.

        Raises:
            RuntimeError: the state dict does not fit the backbone.
            KeyError: there is no such task, or `state` has weights for other tasks only.
            ValueError: there is no such split, it has no images, or the network's features of them are not finite.
        """

        def accuracy(name: str, model: nn.Module) -> float:
            images = self._images(name, split)
            return (self._predict(name, model, images) == images.labels).float().mean().item()

        experts = self.recorded.get(split, {}).get("experts", {})
        return Evaluation(self._each(state, names_asked(tasks, self.tasks), accuracy), experts, split)

    def predict(self, state: Weights | WeightsByTask, task: str, *, split: str = "test") -> Tensor:
        """The class that one set of weights predicts for every image of a task's split, shape (N,), on the CPU.

        Raises:
            As `evaluate`.
        """
        images = self._images(task, split)
        return self._each(state, [task], lambda name, model: self._predict(name, model, images))[task]

    def _predict(self, task: str, model: nn.Module, images: Split) -> Tensor:
        return self.logits(model, task, images).argmax(1).cpu()

    def losses(
        self,
        state: Weights | WeightsByTask = None,
        *,
        split: str = "validation",
        tasks: Iterable[str] | None = None,
    ) -> dict[str, float]:
        """Mean cross-entropy (in nats) per task; arguments and errors are those of `evaluate`."""

        def loss(name: str, model: nn.Module) -> float:
            images = self._images(name, split)
            logits = self.logits(model, name, images)
            return F.cross_entropy(logits, images.labels.to(logits.device)).item()

        return self._each(state, names_asked(tasks, self.tasks), loss)

    def gradient(
        self,
        state: Weights | WeightsByTask,
        task: str,
        *,
        split: str = "validation",
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> StateDict:
        """The gradient of a task's mean loss by the weights, at one set of weights: by parameter name.

        A module is left as it was, the gradients in it included. Parameters that are frozen
        (``requires_grad=False``) or do not matter to the loss have no gradient.

        Args:
            state: as for `evaluate`.
            task: a task's name.
            split: the images.
            loss: ``loss(logits, labels)``, a mean over images; by default the cross-entropy in nats.

        Raises:
            As `evaluate`, and ValueError: every parameter is frozen.
        """
        images = self._images(task, split)

        def parts(model: nn.Module) -> Iterator[Tensor]:
            for batch in images.batches(EVALUATION_BATCH):
                logits = self._read(task, model(self.prepare(batch.images)))
                yield loss(logits, batch.labels.to(logits.device)) * len(batch.labels) / len(images)

        def gradient(name: str, model: nn.Module) -> StateDict:
            keep_freed_memory()
            with one_thread(), in_inference_mode(model):
                return sum_of_gradients(model, parts(model))

        return self._each(state, [task], gradient)[task]

    def _images(self, task: str, split: str) -> Split:
        """The images that a task is measured on."""
        images = self.task(task).split(split)
        if not len(images):
            raise ValueError(f"'{task}' has no {split} images, so there is nothing to measure.")
        return images

    def calibration(
        self, task: str, images: int = 100, *, split: str = "train", batch: int = 25, seed: int = 0
    ) -> list[tuple[Tensor, Tensor]]:
        """A few images of a task as the backbone's inputs, with labels: batches of (inputs, labels).

        Args:
            task: a task's name.
            images: how many, drawn at random; all, if the split has no more. A larger draw begins with the smaller one.
            split: to draw from. Whatever is fitted to them should not be judged by them.
            batch: images per batch.
            seed: of the draw.

        Raises:
            KeyError: there is no such task.
            ValueError: there is no such split, or fewer than one image is asked for.
        """
        if images < 1 or batch < 1:
            raise ValueError(f"expected at least one image and one per batch; got {images} and {batch}.")
        whole = self.task(task).split(split)
        drawn = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:images]
        few = whole[drawn]
        return [(self.prepare(part.images), part.labels.to(self.device)) for part in few.batches(batch)]

    def curvature(
        self, kind: str, *, images: int = 100, seed: int = 0, progress: bool = True, **options: Any
    ) -> dict[str, Curvature]:
        """The curvature of every expert around itself, from a few training images of its task.

        Args:
            kind: ``"inputs"``, ``"fisher"`` or ``"kfac"``: gathered by `input_grams`, `diagonal_fisher` or `kfac`.
            images: how many per task.
            seed: of the draw of images.
            progress: show a progress bar.
            **options: passed on, such as ``labels="expected"``.

        Returns:
            By task, in the order of `task_vectors`: what `regmean`, `fisher` and `mats` take.

        Raises:
            ValueError: another kind, fewer than one image, or experts that were trained as linearised networks.
        """
        from tqdm.auto import tqdm

        if self.recipe.tangent:
            raise ValueError(
                f"the experts of '{self.name}' are linearised networks, whose layers have no inputs of their own."
            )

        if kind not in ("inputs", "fisher", "kfac"):
            raise ValueError(f"kind must be inputs, fisher or kfac; got '{kind}'.")
        keep_freed_memory()
        gathered = {}
        with one_thread():
            for name in tqdm(self.task_vectors.names, desc=f"curvature ({kind})", disable=None if progress else True):
                batches = self.calibration(name, images, seed=seed)
                with self._network(self.experts[name]) as model:
                    if kind == "inputs":
                        gathered[name] = input_grams(model, batches, **options)
                    else:
                        gather = kfac if kind == "kfac" else diagonal_fisher
                        gathered[name] = gather(model, batches, head=self.heads[name], **options)
        return gathered

    def _each(
        self, state: Weights | WeightsByTask, tasks: Iterable[str], measure: Callable[[str, nn.Module], T]
    ) -> dict[str, T]:
        """``measure(task, network)`` for each task and the network that answers it: by task."""
        if not _is_by_task(state):
            with self._network(cast("Weights", state)) as model:
                return {task: measure(task, model) for task in tasks}
        measured = {}
        for task in tasks:
            self.task(task)  # says if there is no such task at all
            if task not in state:
                raise KeyError(f"no weights for the task '{task}'; there are some for {', '.join(state)}.")
            with self._network(state[task]) as model:
                measured[task] = measure(task, model)
        return measured

    @contextmanager
    def _network(self, state: Weights) -> Iterator[nn.Module]:
        """The network with these weights: linearised, if the suite's experts were trained so.

        Weights are loaded into a copy of the backbone, as copying takes longer than that. A copy in use is nobody
        else's: several threads can measure at once, each in a copy of its own.
        """
        if isinstance(state, nn.Module):
            yield state
        elif self.recipe.tangent and state is not None:
            yield Linearized(self.model, state)
        else:
            try:
                copied = self._copies.pop()
            except IndexError:
                copied = self.build().eval()
            try:
                copied.load_state_dict(self.base if state is None else state)
                yield copied
            finally:
                copied.zero_grad()
                self._copies.append(copied)

    @cached_property
    def _copies(self) -> list[nn.Module]:
        """Copies of the backbone that nobody uses at the moment."""
        return []

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to other processes and copied: everything but the spare copies of the backbone."""
        return {name: value for name, value in self.__dict__.items() if name != "_copies"}

    def evaluate_experts(self, *, split: str = "test") -> Evaluation:
        """Each expert on its own task: the ceiling that merges are measured against."""
        accuracy = self.evaluate(self.experts, split=split, tasks=self.experts).accuracy
        return Evaluation(accuracy, accuracy, split)

    def compare(self, merges: Mapping[str, Weights | WeightsByTask], *, split: str = "test") -> pd.DataFrame:
        """Evaluate several merges, each as in `evaluate`, and show them as one table, a row each."""
        return compare({name: self.evaluate(state, split=split) for name, state in merges.items()})

    def task(self, name: str) -> Task:
        """A task by name, merged or held out.

        Raises:
            KeyError: there is no such task.
        """
        known = {**self.tasks, **self.held_out}
        if name not in known:
            raise KeyError(f"no task named '{name}'; there are {', '.join(known)}.")
        return known[name]

    def cut(self, images: int | None = None, *, tasks: Iterable[str] | None = None, seed: int = 0) -> Suite:
        """This suite with fewer tasks and at most `images` images in each split, for maps of many merges.

        Args:
            images: how many of each split to keep, drawn at random; by default all.
            tasks: names of tasks to keep, in the suite's order; by default all.
            seed: of the draw.

        Raises:
            KeyError: there is no such task.
            ValueError: fewer than one image.
        """
        if images is not None and images < 1:
            raise ValueError(f"at least one image per split must remain; got {images}.")
        generator = torch.Generator().manual_seed(seed)

        def few(split: Split) -> Split:
            return split[torch.randperm(len(split), generator=generator)[:images].sort().values]

        wanted = {self.task(name).name for name in names_asked(tasks, self.tasks)}
        kept = [task for name, task in self.tasks.items() if name in wanted]
        smaller = {
            task.name: replace(task, train=few(task.train), validation=few(task.validation), test=few(task.test))
            for task in kept
        }
        experts = {name: expert for name, expert in self.experts.items() if name in smaller}
        return replace(self, tasks=smaller, experts=experts, recorded={})

    def halves(self, seed: int = 0) -> tuple[Suite, Suite]:
        """Two suites that share everything but the merged tasks' test images, of which each has one half.

        For methods that adapt to test images: adapt to the first half's `inputs`, and score on the second half what
        was never seen. Scored on the first half, a merge has seen the very images that it is asked about.

        Args:
            seed: of the random division.

        Raises:
            ValueError: a task has fewer than two test images.
        """
        generator = torch.Generator().manual_seed(seed)
        parts: tuple[dict[str, Task], dict[str, Task]] = {}, {}
        for name, task in self.tasks.items():
            if len(task.test) < 2:
                raise ValueError(f"'{name}' has {len(task.test)} test image(s), too few for two halves.")
            order = torch.randperm(len(task.test), generator=generator)
            for part, chosen in zip(parts, order.chunk(2), strict=True):
                part[name] = replace(task, test=task.test[chosen])
        first, second = (replace(self, tasks=part, recorded={}) for part in parts)
        return first, second

    def inputs(self, split: str = "test") -> dict[str, Tensor]:
        """The images of every merged task as the backbone takes them, without labels: by task, (N, 3, H, W).

        Raises:
            ValueError: there is no such split.
        """
        return {
            name: torch.cat([self.prepare(batch.images) for batch in task.split(split).batches(EVALUATION_BATCH)])
            for name, task in self.tasks.items()
        }

    # ---------------------------------------------------------------- making a suite

    def finetune(self, task: str | None = None, *, progress: bool = True) -> StateDict | None:
        """Train the expert of one task, or of every task that has none yet, and keep it in `experts`."""
        from mergekit_lite.suites.finetune import finetune

        for name in [task] if task else [t for t in self.tasks if t not in self.experts]:
            self.experts[name] = finetune(self, name, seed=self.seed, progress=progress)
        self.recorded.setdefault("validation", {})["experts"] = dict(self.evaluate_experts(split="validation"))
        self.recorded.setdefault("test", {})["experts"] = dict(self.evaluate_experts(split="test"))
        return self.experts[task] if task else None

    @classmethod
    def from_tasks(
        cls,
        name: str,
        model: nn.Module,
        tasks: Iterable[Task],
        recipe: Recipe,
        *,
        held_out: Iterable[Task] = (),
        seed: int = 0,
        device: str = "auto",
    ) -> Suite:
        """A suite without experts: the heads are made from the base's features, the rest waits for `finetune`."""
        where = pick_device(device)
        suite = cls(
            name,
            model.to(where).eval(),
            {task.name: task for task in tasks},
            {},
            recipe,
            held_out={task.name: task for task in held_out},
            seed=seed,
            device=where,
        )
        suite.heads = suite._make_heads()
        return suite

    def _make_heads(self) -> dict[str, CosineHead]:
        """A head per task, held-out ones too; the shared centre is that of the merged tasks alone."""
        generator = torch.Generator().manual_seed(self.recipe.head_seed)
        examples = {}
        for name, task in {**self.tasks, **self.held_out}.items():
            few = task.train[few_per_class(task.train.labels, self.recipe.shots, generator)]
            examples[name] = (self.features(self.model, few), few.labels.to(self.device))
        return make_heads(examples, self.tasks, self.recipe.centre, self.recipe.temperature)

    @classmethod
    def from_folders(
        cls,
        folders: Iterable[PathLike],
        backbone: str | nn.Module,
        *,
        pretrained: bool = True,
        recipe: Recipe | None = None,
        name: str = "my suite",
        seed: int = 0,
        device: str = "auto",
        **recipe_options: Any,
    ) -> Suite:
        """A suite of your own: folders of images and any timm backbone.

        Args:
            folders: list of folders, one per task, each ``<task>/{train,test}/<class>/<image>``; a
                ``validation`` (or ``val``) folder is used if there is one, else a fifth of the training images.
                Small tasks are kept in memory, large ones are read from disk as they are needed.
            backbone: a timm model's name, or a module from images (N, 3, H, W) to features (N, c). A module is copied.
            pretrained: let timm load pre-trained weights (needs a network). Merging from a random base
                is possible, and fails in instructive ways.
            recipe: how to prepare images, make heads and train experts; by default pocket8's, but with images prepared
                as timm says the backbone wants them. Where a recipe does not say `mean`, `std` or `interpolation`,
                they are the backbone's, too.
            name: of the suite.
            seed: of the fine-tuning.
            device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
            **recipe_options: changes to the recipe, such as ``resolution=224``, ``steps=1000`` or ``mean=(0, 0, 0)``.

        Raises:
            FileNotFoundError, ValueError: a folder that is not laid out like this; the message says where.
            TypeError: one folder instead of a list of folders.
        """
        paths = list_of_folders(folders)
        if isinstance(backbone, str):
            model = build_backbone(backbone, pretrained=pretrained)
        else:
            model = copy.deepcopy(backbone)
        given = recipe_for(model, recipe, recipe_options)
        tasks = [load_folder(path, given.resolution, interpolation=str(given.interpolation)) for path in paths]
        if len({task.name for task in tasks}) < len(tasks):
            raise ValueError(f"two folders have the same name: {', '.join(task.name for task in tasks)}.")
        return cls.from_tasks(name, model, tasks, given, seed=seed, device=device)
