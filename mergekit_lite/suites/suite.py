"""A suite: one backbone, K tasks with frozen heads, a base and K experts. The lab's test bench."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergekit_lite.calibrated import Curvature, diagonal_fisher, input_grams, kfac
from mergekit_lite.checkpoints import PathLike, StateDict
from mergekit_lite.linearization import Linearized
from mergekit_lite.suites.heads import CosineHead, class_directions, few_per_class
from mergekit_lite.suites.recipe import Recipe
from mergekit_lite.suites.speed import keep_freed_memory, one_thread
from mergekit_lite.suites.tasks import Split, Task, load_folder
from mergekit_lite.suites.vision import build_backbone, pick_device
from mergekit_lite.task_vectors import TaskVectors

if TYPE_CHECKING:
    import pandas as pd

# One set of weights for all tasks (the base's, if None), and one for each task.
Weights = Mapping[str, Tensor] | nn.Module | None
WeightsByTask = Mapping[str, StateDict]

# Images evaluated at a time; more of them are no faster and need more memory.
EVALUATION_BATCH = 50


@dataclass(frozen=True)
class Evaluation(Mapping[str, float]):
    """Accuracy per task; a mapping from task names to shares of images classified correctly.

    Attributes:
        accuracy: per task, in [0, 1].
        experts: the accuracy of each task's own expert on the same images, where it is known.
        split: the images it was measured on.
    """

    accuracy: dict[str, float]
    experts: dict[str, float] = field(default_factory=dict)
    split: str = "test"

    def __getitem__(self, task: str) -> float:
        return self.accuracy[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self.accuracy)

    def __len__(self) -> int:
        return len(self.accuracy)

    @property
    def average(self) -> float:
        """The mean accuracy over the tasks."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    @property
    def normalised(self) -> float:
        """The mean over the tasks of accuracy / the expert's accuracy (NaN where none is known)."""
        if not set(self.accuracy) <= set(self.experts):
            return float("nan")
        return sum(self.accuracy[t] / self.experts[t] for t in self.accuracy) / len(self.accuracy)

    def to_frame(self) -> pd.DataFrame:
        """One row: a column per task, then the average and the normalised average."""
        return compare({self.split: self})

    def __repr__(self) -> str:
        tasks = ", ".join(f"{task} {value:.3f}" for task, value in self.accuracy.items())
        return f"{self.split}: average {self.average:.3f} ({tasks})"

    def _repr_html_(self) -> str:
        return str(self.to_frame().style.format("{:.3f}", na_rep="").to_html())


def compare(evaluations: Mapping[str, Evaluation]) -> pd.DataFrame:
    """Evaluations as one table: a row each, a column per task, then average and normalised average."""
    import pandas as pd

    rows = {
        name: {**evaluation.accuracy, "average": evaluation.average, "normalised": evaluation.normalised}
        for name, evaluation in evaluations.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").dropna(axis="columns", how="all")


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
        """uint8 images (N, 1 or 3, H, W) as the backbone's input: (N, 3, resolution, resolution) in [-1, 1]."""
        size = (self.recipe.resolution, self.recipe.resolution)
        pixels = images.to(self.device).float() / 127.5 - 1
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
        return pixels.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def features(self, model: nn.Module, split: Split) -> Tensor:
        """Features (N, c) of all images of a split."""
        keep_freed_memory()
        with one_thread():
            return torch.cat([model(self.prepare(batch.images)) for batch in split.batches(EVALUATION_BATCH)])

    def logits(self, model: nn.Module, task: str, split: Split) -> Tensor:
        """Logits (N, classes of the task) of all images of a split."""
        return self.heads[task](self.features(model, split))

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
            ValueError: there is no such split.
        """
        accuracy = {}
        for name, model in self._models(state, self.tasks if tasks is None else tasks):
            images = self.task(name).split(split)
            accuracy[name] = (self.predict(model, name, split=split) == images.labels).float().mean().item()
        return Evaluation(accuracy, self.recorded.get(split, {}).get("experts", {}), split)

    def predict(self, state: Weights | WeightsByTask, task: str, *, split: str = "test") -> Tensor:
        """The class that one set of weights predicts for every image of a task's split, shape (N,), on the CPU.

        Raises:
            As `evaluate`.
        """
        ((_, model),) = self._models(state, [task])
        return self.logits(model, task, self.task(task).split(split)).argmax(1).cpu()

    def losses(
        self,
        state: Weights | WeightsByTask = None,
        *,
        split: str = "validation",
        tasks: Iterable[str] | None = None,
    ) -> dict[str, float]:
        """Mean cross-entropy (in nats) per task; arguments and errors are those of `evaluate`."""
        losses = {}
        for name, model in self._models(state, self.tasks if tasks is None else tasks):
            images = self.task(name).split(split)
            logits = self.logits(model, name, images)
            losses[name] = F.cross_entropy(logits, images.labels.to(logits.device)).item()
        return losses

    def gradient(
        self,
        state: Weights | WeightsByTask,
        task: str,
        *,
        split: str = "validation",
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> StateDict:
        """The gradient of a task's mean loss by the weights, at one set of weights: by parameter name.

        Args:
            state: as for `evaluate`.
            task: a task's name.
            split: the images.
            loss: ``loss(logits, labels)``, a mean over images; by default the cross-entropy in nats.

        Raises:
            As `evaluate`.
        """
        ((_, model),) = self._models(state, [task])
        images = self.task(task).split(split)
        keep_freed_memory()
        with one_thread(), torch.enable_grad():
            for batch in images.batches(EVALUATION_BATCH):
                logits = self.heads[task](model(self.prepare(batch.images)))
                part = loss(logits, batch.labels.to(logits.device)) * len(batch.labels) / len(images)
                part.backward()  # gradients add up over the batches
        return {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}

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
                model, batches = self._as_module(self.experts[name]), self.calibration(name, images, seed=seed)
                if kind == "inputs":
                    gathered[name] = input_grams(model, batches, **options)
                else:
                    gather = kfac if kind == "kfac" else diagonal_fisher
                    gathered[name] = gather(model, batches, head=self.heads[name], **options)
        return gathered

    def _models(self, state: Weights | WeightsByTask, tasks: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
        """Each task and the network that answers it, to be used before the next one is asked for."""
        if _is_by_task(state):
            for task in tasks:
                self.task(task)  # says if there is no such task at all
                if task not in state:
                    raise KeyError(f"no weights for the task '{task}'; there are some for {', '.join(state)}.")
                yield task, self._as_module(state[task])
        else:
            model = self._as_module(cast("Weights", state))
            yield from ((task, model) for task in tasks)

    def _as_module(self, state: Weights) -> nn.Module:
        """The network with these weights, in inference mode: linearised, if the suite's experts were trained so."""
        if isinstance(state, nn.Module):
            return state.eval()
        if self.recipe.tangent and state is not None:
            return Linearized(self.model, state)
        self._bench.load_state_dict(self.base if state is None else state)
        self._bench.zero_grad(set_to_none=True)
        return self._bench

    @cached_property
    def _bench(self) -> nn.Module:
        """One copy of the backbone into which weights are loaded to be measured; copying takes longer than that."""
        return self.build().eval()

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

        wanted = {self.task(name).name for name in (self.tasks if tasks is None else tasks)}
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
        return {name: self.prepare(task.split(split).images) for name, task in self.tasks.items()}

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
            examples[name] = (self.features(self.model, few).clone(), few.labels.to(self.device))
        means = {name: features.mean(0) for name, (features, _) in examples.items()}
        shared = torch.stack([means[name] for name in self.tasks]).mean(0)
        centres = {
            "shared": dict.fromkeys(means, shared),
            "task": means,
            "none": dict.fromkeys(means, torch.zeros_like(shared)),
        }
        if self.recipe.centre not in centres:
            raise ValueError(f"centre must be one of {', '.join(centres)}; got '{self.recipe.centre}'.")
        centre = centres[self.recipe.centre]
        return {
            name: CosineHead(centre[name], class_directions(features, labels), self.recipe.temperature)
            for name, (features, labels) in examples.items()
        }

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
            folders: one folder per task, each ``<task>/{train,test}/<class>/<image>``; a
                ``validation`` folder is used if there is one, else a fifth of the training images.
            backbone: a timm model's name, or a module from images (N, 3, H, W) to features (N, c).
            pretrained: let timm load pre-trained weights (needs a network). Merging from a random base
                is possible, and fails in instructive ways.
            recipe: how to prepare images, make heads and train experts; by default pocket8's.
            name: of the suite.
            seed: of the fine-tuning.
            device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
            **recipe_options: changes to the recipe, such as ``resolution=224`` or ``steps=1000``.

        Raises:
            FileNotFoundError, ValueError: a folder that is not laid out like this; the message says where.
        """
        recipe = (recipe or Recipe()).but(**recipe_options)
        tasks = [load_folder(folder, recipe.resolution) for folder in map(Path, folders)]
        if not tasks:
            raise ValueError("no folders given: a suite needs at least one task.")
        if len({task.name for task in tasks}) < len(tasks):
            raise ValueError(f"two folders have the same name: {', '.join(task.name for task in tasks)}.")
        model = build_backbone(backbone, pretrained=pretrained) if isinstance(backbone, str) else backbone
        return cls.from_tasks(name, model, tasks, recipe, seed=seed, device=device)
