"""LotteryTicketTrainer: lottery-ticket sparse fine-tuning with the Hugging Face Trainer.

    args = TrainingArguments("runs/ner", num_train_epochs=3, learning_rate=5e-5)
    sft_args = SparseFineTuningArguments(k=14_155_776, sparse_max_epochs=10)
    trainer = LotteryTicketTrainer(model, args, train_dataset=…, sft_args=sft_args)
    trainer.train()
    trainer.delta.save("ner.safetensors")

`LotteryTicket` runs the phases; in each of them the Trainer's own loop trains, with that phase's
optimizer. Works with transformers 4.57 and 5.
"""

from __future__ import annotations

import copy
import functools
import glob
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, set_seed
from transformers.trainer_utils import TrainOutput, enable_full_determinism

from . import criteria
from .compose import active
from .delta import SparseDelta
from .families import decouple_output_embeddings, freeze_norms
from .files import FILE_NAME
from .loop import Length
from .lottery import LotteryTicket, Phase
from .registry import DeltaRegistry
from .runs import NAME as RUN_NAME
from .sources import MultiSource, check_sources, sources_on, trained_on

__all__ = ["LotteryTicketMixin", "LotteryTicketTrainer", "SparseFineTuningArguments"]

# What a checkpoint must hold, besides the model, for a phase to go on from it to the same bits.
_WHOLE = ("optimizer.pt", "scheduler.pt")
# Of the evaluation's figures, those that say how fast it was.
_SPEED = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}
# TrainingArguments that a run may go on with other values of: all else may decide the result.
_HARMLESS = {
    # The lengths that come of these are compared themselves.
    *("max_steps", "num_train_epochs", "warmup_steps", "warmup_ratio"),
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "project"),
    *("do_train", "do_eval", "do_predict", "restore_callback_states_from_checkpoint", "local_rank"),
    *("disable_tqdm", "report_to", "skip_memory_metrics", "debug", "ray_scope"),
    *("per_device_eval_batch_size", "per_gpu_eval_batch_size", "eval_accumulation_steps"),
    *("include_inputs_for_metrics", "include_for_metrics", "batch_eval_metrics"),
    *("include_tokens_per_second", "include_num_input_tokens_seen", "enable_jit_checkpoint"),
    *("dataloader_pin_memory", "dataloader_prefetch_factor", "torch_empty_cache_steps"),
}
_HARMLESS_PREFIXES = ("log", "save_", "hub_", "push_to_hub", "trackio_", "ddp_")
# The ids of the trainer's own deltas in its registry, beside the sources' names.
_SOURCE, _RESULT = "<source>", "<result>"

# A Trainer, or any class of one: it comes with the class that the mixin stands before.
_Trainer: Any = object


@dataclass
class SparseFineTuningArguments:
    """What sparse fine-tuning needs beside `TrainingArguments`; made for `HfArgumentParser`.

    All else comes from `TrainingArguments`: batch size, learning rate and its schedule, decay,
    clipping, precision, accumulation, evaluation and checkpoints, and the seed.
    """

    k: int | None = field(
        default=None,
        metadata={"help": "Entries to select among those of the backbone (give k or density)."},
    )
    density: float | None = field(
        default=None, metadata={"help": "Their share of the backbone's entries, in (0, 1]."}
    )
    iterations: int = field(
        default=1, metadata={"help": "Iterations; each selects its share of the entries."}
    )
    full_l1: float = field(
        default=0.0,
        metadata={"help": "λ of the L1 term in full phases (the paper: 0.1 for languages)."},
    )
    sparse_l1: float = field(default=0.0, metadata={"help": "λ of the L1 term in sparse phases."})
    l1_heads: bool = field(
        default=True, metadata={"help": "Whether the L1 term holds the heads too."}
    )
    criterion: str = field(
        default="magnitude",
        metadata={"help": 'How entries are ranked: "magnitude", "denoised", "random", …'},
    )
    criterion_options: str | None = field(
        default=None, metadata={"help": 'Its options as JSON, such as {"rank": "var:0.9"}.'}
    )
    eps: float = field(
        default=0.0,
        metadata={"help": "Leave entries with |φ| ≤ eps out of the result, if eps > 0."},
    )
    freeze_norms: bool = field(
        default=True, metadata={"help": "Freeze the normalisation layers, as the paper does."}
    )
    decouple_output_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Give the output embeddings a frozen matrix of their own; for languages."
        },
    )
    full_min_steps: int | None = field(
        default=None, metadata={"help": "Steps that a full phase has at least."}
    )
    full_max_steps: int | None = field(
        default=None, metadata={"help": "Steps that it has at most, or has, without epochs."}
    )
    full_max_epochs: float | None = field(
        default=None,
        metadata={
            "help": "Epochs of a full phase. Without epochs and max_steps, the TrainingArguments' "
            "max_steps or num_train_epochs count."
        },
    )
    sparse_min_steps: int | None = field(
        default=None, metadata={"help": "Steps that a sparse phase has at least."}
    )
    sparse_max_steps: int | None = field(
        default=None, metadata={"help": "Steps that it has at most, or has, without epochs."}
    )
    sparse_max_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of a sparse phase."}
    )
    sparse_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of sparse phases; default: that of the full ones."},
    )
    gather: str = field(
        default="step",
        metadata={
            "help": 'When the sparse gradient is gathered: "step", or "hook", which frees each '
            "dense gradient at once."
        },
    )
    source_sft: str | None = field(
        default=None,
        metadata={
            "help": "SFT of the source language, on the model while a task is learnt: a file, a "
            "folder or a Hub id. The result does not contain it."
        },
    )

    def length(self, phase: str, max_steps: int, epochs: float) -> Length:
        """Length of a phase.

        Args:
            phase: "full" or "sparse".
            max_steps: `TrainingArguments.max_steps`, which counts if > 0 and nothing is said here.
            epochs: `TrainingArguments.num_train_epochs`, which counts after that.

        Raises:
            ValueError: A number is out of range.
        """
        least = getattr(self, f"{phase}_min_steps")
        own = {name: getattr(self, f"{phase}_max_{name}") for name in ("epochs", "steps")}
        if own["epochs"] is not None or own["steps"] is not None:
            return Length(epochs=own["epochs"], max_steps=own["steps"], min_steps=least)
        if max_steps > 0:
            return Length(steps=max_steps, min_steps=least)
        return Length(epochs=epochs, min_steps=least)

    def ranking(self) -> Any:
        """The criterion, as `LotteryTicket` takes it.

        Raises:
            ValueError: The options are no JSON object, or there is no such criterion.
        """
        if self.criterion_options is None:
            return self.criterion
        try:
            options = json.loads(self.criterion_options)
        except ValueError:
            options = None
        if not isinstance(options, dict):
            raise ValueError(
                "SparseFineTuningArguments: criterion_options must be a JSON object, got "
                f"{self.criterion_options!r}"
            )
        if self.criterion not in criteria.CRITERIA:
            raise ValueError(
                f"SparseFineTuningArguments: there is no criterion {self.criterion!r}; there are "
                f"{', '.join(sorted(criteria.CRITERIA))}"
            )
        return getattr(criteria, self.criterion)(**options)


class LotteryTicketMixin(_Trainer):  # type: ignore[misc]
    """What `LotteryTicketTrainer` adds to the Trainer; put it before another Trainer's class:

        class Mine(LotteryTicketMixin, Seq2SeqTrainer): …

    Arguments and all else are as there.
    """

    # The Trainer's own.
    args: Any
    control: Any
    eval_dataset: Any
    lr_scheduler: Any
    optimizer: Any
    state: Any
    train_dataset: Any

    def __init__(
        self,
        *args: Any,
        sft_args: SparseFineTuningArguments,
        sources: Mapping[str, SparseDelta | str | os.PathLike[str] | None] | None = None,
        repeat: Mapping[str, int] | None = None,
        meta: Mapping[str, Any] | None = None,
        ticket: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sft_args = sft_args
        self.delta: SparseDelta | None = None
        self.phase: Phase | None = None
        self.phase_states: dict[str, TrainerState] = {}
        # The folder of the last run that was finished here: train() may replace that one.
        self._finished: str | None = None
        self._meta = dict(meta or {})
        self._ticket = dict(ticket or {})
        self._repeat = dict(repeat or {})
        self._check_settings()
        datasets = self.train_dataset if isinstance(self.train_dataset, Mapping) else {}
        if (sources or repeat) and not datasets:
            raise ValueError(
                f"{self._name}: sources and repeat need a train_dataset that is a mapping of "
                f"sources to data sets, got {type(self.train_dataset).__name__}"
            )
        loaded = {source: _loaded(sft) for source, sft in (sources or {}).items()}
        check_sources(self._name, datasets, loaded, self._repeat)
        self._deltas = {source: sft for source, sft in loaded.items() if sft is not None}
        if sft_args.source_sft is not None:
            if datasets:
                raise ValueError(
                    f"{self._name}: source_sft is for one source; give each of several its SFT in "
                    "sources"
                )
            self._deltas = {_SOURCE: SparseDelta.load(sft_args.source_sft)}
        self._registry: DeltaRegistry | None = None
        self._updates: int | None = None
        self._max_grad_norm: float | None = None
        self._outputs: dict[str, TrainOutput] = {}
        if sft_args.decouple_output_embeddings:
            decouple_output_embeddings(self.model)
        if sft_args.freeze_norms:
            freeze_norms(self.model)
        if self.accelerator.device.type == "cpu":
            # With DDP it would "move" the model to cpu:0, and so copy it, under the sources' SFTs.
            self.accelerator.device_placement = False
        self.add_callback(_Between(self))

    # --- training -------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Runs all phases.

        Args:
            resume_from_checkpoint: True goes on with the run in `output_dir`, from its last
                complete checkpoint, to the same bits as without the interruption; a checkpoint's
                folder goes on from that one. The model must be made as it was then.
            trial: Not supported.
            ignore_keys_for_eval: As the Trainer's.

        Returns:
            The steps of all phases that ran, the last one's loss (NaN if no step was left to
            run), and their metrics.

        Raises:
            ValueError: There is no run to go on with, or the folder holds a run or an SFT that this
                trainer has not finished; or settings cannot work.
            TrainingDiverged: The loss is NaN or infinite.
        """
        if trial is not None:
            raise ValueError(f"{self._name}: hyperparameter search is not supported")
        folder = self.args.output_dir
        if self.args.process_index:
            # Each process keeps its own, and all of them are equal.
            folder = os.path.join(folder, f"rank-{self.args.process_index}")
        resume = resume_from_checkpoint not in (None, False)
        self._check_run(folder, resume)
        self._take_off()
        bare = active(self.model) is None
        if self._deltas and not bare:
            raise ValueError(
                f"{self._name}: {active(self.model)!r} is on the model; take it off, the sources' "
                "SFTs are put on by the trainer"
            )
        self.delta, self._outputs = None, {}
        if not resume:
            self.phase_states = {}
        self._registry = sources_on(self.model, self._deltas) if bare else None
        self._updates = self._updates_per_epoch()
        self._check_evaluated()
        settings = {
            "l1": (self.sft_args.full_l1, self.sft_args.sparse_l1),
            "criterion": self.sft_args.ranking(),
            "seed": self.args.seed,
            **{
                n: getattr(self.sft_args, n)
                for n in ("k", "density", "iterations", "l1_heads", "eps")
            },
            **self._ticket,
        }
        train_phase = functools.partial(
            self._train_phase, resume=resume_from_checkpoint, ignore_keys=ignore_keys_for_eval
        )
        train_phase.settings = self._settings()  # type: ignore[attr-defined]
        with self._source(_SOURCE):
            ticket = LotteryTicket(self.model, **settings)
            self.delta = ticket.fit(
                train_phase, folder, fresh=not resume, progress=False, **self._metadata()
            )
        self._finished = folder
        if bare:
            self._put_on()
        outputs = self._outputs
        return TrainOutput(
            sum(output.global_step for output in outputs.values()),
            [output.training_loss for output in outputs.values()][-1] if outputs else math.nan,
            {
                f"{n}_{key}": value
                for n, out in outputs.items()
                for key, value in out.metrics.items()
            },
        )

    def _train_phase(
        self, phase: Phase, resume: str | bool | None, ignore_keys: list[str] | None
    ) -> None:
        whole, name = self.args, _folder(phase)
        try:
            self.phase, self.args = phase, self._phase_args(phase)
            if _SOURCE not in self._deltas:
                # Accelerate may put the parameters elsewhere: made anew at the first batch.
                self._registry = None
            checkpoint = None
            if isinstance(resume, (str, os.PathLike)) and not self._outputs:
                checkpoint = _in_phase(os.fspath(resume), self.args.output_dir)
            elif resume:
                checkpoint = _last_checkpoint(self.args.output_dir)
            seed = enable_full_determinism if whole.full_determinism else set_seed
            seed(whole.seed)
            try:
                output = super().train(
                    resume_from_checkpoint=checkpoint, ignore_keys_for_eval=ignore_keys
                )
            except _PhaseOver:
                output = self._finish_phase()
            self._check_best(name)
        finally:
            self.phase, self.args = None, whole
            # The moments of a full phase are twice the model: they must not outlive it.
            self.optimizer = self.lr_scheduler = None
            self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
            self.accelerator.free_memory()
        self.phase_states[name] = self.state
        self._outputs[name] = output

    def _finish_phase(self) -> TrainOutput:
        """Ends a phase whose last step was stored before the run was interrupted."""
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, math.nan, {})

    def _phase_args(self, phase: Phase) -> Any:
        """The TrainingArguments of one phase."""
        args = copy.copy(self.args)
        args.output_dir = os.path.join(args.output_dir, _folder(phase))
        if getattr(args, "logging_dir", None):
            args.logging_dir = os.path.join(args.logging_dir, _folder(phase))
        args.max_steps = self._length(phase.name).resolve(self._updates)
        if phase.name == "sparse" and self.sft_args.sparse_learning_rate is not None:
            args.learning_rate = self.sft_args.sparse_learning_rate
        # The phase's optimizer clips, after the mask and the L1 term.
        self._max_grad_norm, args.max_grad_norm = args.max_grad_norm, 0.0
        return args

    def _length(self, phase: str) -> Length:
        return self.sft_args.length(phase, self.args.max_steps, self.args.num_train_epochs)

    def _updates_per_epoch(self) -> int | None:
        """Optimizer steps of one epoch; None for data without a length."""
        loader = self.get_train_dataloader()
        try:
            batches = len(loader)
        except TypeError:
            return None
        if not batches:
            raise ValueError(f"{self._name}: the train_dataset gives no batch")
        accumulate: int = self.args.gradient_accumulation_steps
        return -(-batches // accumulate)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of the phase: AdamW over everything, or `MaskedAdamW` over the support."""
        if self.phase is None:
            made: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
            return made
        settings = self.args
        decayed = set(self.get_decay_parameter_names(self.model))
        names = [n for n, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [n for n in names if n in decayed], "weight_decay": settings.weight_decay},
            {"params": [n for n in names if n not in decayed], "weight_decay": 0.0},
        ]
        self.optimizer = made = self.phase.optimizer(
            max_grad_norm=self._max_grad_norm or None,
            groups=[group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            gather=self.sft_args.gather,
        )
        return made

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, with the SFT of the batch's source on the model."""
        with self._source(getattr(inputs, "source", None)):
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if self.phase is not None:
            self.phase.step = self.state.global_step
            self.phase.log(loss)
        return loss

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        better: bool = super()._determine_best_metric(*args, **kwargs)
        if better:
            # transformers 4.57 does not with save_strategy="best", and so never finds it again.
            self.state.best_global_step = self.state.global_step
        return better

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # That of the dense gradients, which transformers 5 computes even where it does not clip.
        return None if self.phase is not None else super()._get_grad_norm(model, grad_norm)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with "l1", "moved" and the norm of the tuned gradients."""
        if self.phase is not None and "loss" in logs:
            norm = self.phase.grad_norm
            own = {} if norm is None else {"grad_norm": float(norm)}
            logs = {**logs, **own, **self.phase.distance()}
        super().log(logs, *args, **kwargs)

    # --- data and sources -----------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's; of several sources, one that mixes the Trainer's of each."""
        datasets = self.train_dataset
        if not isinstance(datasets, Mapping):
            loader: DataLoader[Any] = super().get_train_dataloader()
            return loader
        loaders = {}
        try:
            for source, dataset in datasets.items():
                self.train_dataset = dataset
                loaders[source] = super().get_train_dataloader()
        finally:
            self.train_dataset = datasets
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        mixed = MultiSource(loaders, repeat=self._repeat, seed=seed)
        return DataLoader(mixed, batch_size=None, collate_fn=_as_it_is)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Number of examples in a data loader, of all its sources."""
        mixed = dataloader.dataset
        if not isinstance(mixed, MultiSource):
            return int(super().num_examples(dataloader))
        return sum(
            int(super(LotteryTicketMixin, self).num_examples(loader)) * mixed.repeat[source]
            for source, loader in mixed.batches.items()
        )

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        source: str | None = None,
        **kwargs: Any,
    ) -> dict[str, float]:
        """The Trainer's, with the source's SFT on the model; of several sources, each with its own,
        and their mean.

        Args:
            eval_dataset: As the Trainer's; a mapping of sources to data sets is evaluated source by
                source, where there are several to train on.
            ignore_keys: As the Trainer's.
            metric_key_prefix: As the Trainer's.
            source: Of several sources, the one whose SFT is on the model for other data; default:
                none of them.
            **kwargs: As the Trainer's.

        Raises:
            ValueError: There is no such source.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics: dict[str, float]
        if not isinstance(self.train_dataset, Mapping) or not isinstance(given, Mapping):
            with self._chosen(source):
                metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
            return dict(metrics)
        metrics = {}
        own: list[dict[str, float]] = []
        for name, dataset in given.items():
            prefix = f"{metric_key_prefix}_{name}"
            with self._source(name), self._one_evaluation():
                found = super().evaluate(
                    name if eval_dataset is None else dataset, ignore_keys, prefix, **kwargs
                )
            metrics |= found
            if name in self.train_dataset:
                at = f"{prefix}_"
                own.append({k.removeprefix(at): v for k, v in found.items() if k.startswith(at)})
        if mean := {f"{metric_key_prefix}_{key}": v for key, v in _mean(own).items()}:
            metrics |= mean
            self.log(mean)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @contextmanager
    def _one_evaluation(self) -> Iterator[None]:
        """Has callbacks take a source's evaluation for a prediction: early stopping counts one
        evaluation, that of all sources, and finds every source's metrics in it."""
        handler = self.callback_handler
        handler.on_evaluate = handler.on_predict
        try:
            yield
        finally:
            del handler.on_evaluate

    def predict(self, *args: Any, source: str | None = None, **kwargs: Any) -> Any:
        """The Trainer's, with the source's SFT on the model.

        Args:
            *args: As the Trainer's.
            source: Of several sources, the one whose SFT is on the model; default: none of them.
            **kwargs: As the Trainer's.

        Raises:
            ValueError: There is no such source.
        """
        with self._chosen(source):
            return super().predict(*args, **kwargs)

    def _chosen(self, source: str | None) -> AbstractContextManager[None]:
        """What evaluation has on the model: the SFT of the source that the caller names, or of the
        only one."""
        sources = list(self.train_dataset) if isinstance(self.train_dataset, Mapping) else []
        if source is not None and source not in sources:
            raise ValueError(
                f"{self._name}: there is no source {source!r}; the train_dataset has "
                f"{', '.join(map(repr, sources)) or 'none by name'}"
            )
        # During training the only one is on the model all the time.
        return self._source(_SOURCE if source is None and self.phase is None else source)

    @contextmanager
    def _source(self, source: str | None) -> Iterator[None]:
        """A source's SFT on the model, beside what has been learnt; nothing for one without."""
        if source not in self._deltas:
            yield
            return
        if self._registry is None:
            theta0 = None if self.phase is None else self.phase.theta0
            self._registry = sources_on(self.model, self._deltas, theta0)
        learnt = [_RESULT] if _RESULT in self._registry else []
        with self._registry.active([*learnt, source], heads=learnt):
            yield

    # --- the result -----------------------------------------------------------------------------

    def _put_on(self) -> None:
        """Puts the result on the model, for evaluation."""
        assert self.delta is not None
        self._registry = sources_on(self.model, {**self._deltas, _RESULT: self.delta})
        self._registry.activate(_RESULT, heads=_RESULT)

    def _take_off(self) -> None:
        if self._registry is not None:
            self._registry.deactivate()

    @contextmanager
    def base_model(self) -> Iterator[nn.Module]:
        """The model as it was before training, for a block: with nothing on it."""
        with nullcontext() if self._registry is None else self._registry.active([]):
            yield self.model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the SFT, as `sft.safetensors`; before and during training, the model as the Trainer
        does."""
        if self.phase is not None:
            # What is stored comes from before a divergence.
            self.phase.check_losses()
            if _internal_call and self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = output_dir
        if self.phase is not None or self.delta is None:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = self.args.output_dir if output_dir is None else output_dir
            os.makedirs(folder, exist_ok=True)
            self.delta.save(folder)

    # --- checks ---------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_settings(self) -> None:
        args, sft_args = self.args, self.sft_args
        if sft_args.gather == "hook" and args.world_size > 1:
            raise ValueError(
                f'{self._name}: gather="hook" takes gradients before the processes have averaged '
                'them; use gather="step"'
            )
        if self.model_init is not None:
            raise ValueError(f"{self._name}: model_init is not supported; give the model itself")
        if (
            self.optimizer is not None
            or self.lr_scheduler is not None
            or getattr(self, "optimizer_cls_and_kwargs", None) is not None
            or args.optim not in ("adamw_torch", "adamw_torch_fused")
            or args.optim_args
        ):
            raise ValueError(
                f"{self._name}: each phase makes its own AdamW and schedule from the "
                "TrainingArguments (learning_rate, adam_beta1, …); leave optimizers out, and "
                f"optim={args.optim.value!r}, optim_args={args.optim_args!r} at their defaults"
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                f"{self._name}: DeepSpeed and FSDP shard the parameters, which sparse fine-tuning "
                "needs whole; use one device for each process (DDP)"
            )
        if args.auto_find_batch_size:
            raise ValueError(
                f"{self._name}: auto_find_batch_size would train again from weights that have "
                "moved; set per_device_train_batch_size"
            )
        # Where there are fewer checkpoints than evaluations, the best one is not among them.
        if (
            args.load_best_model_at_end
            and args.save_strategy == "steps"
            and args.save_steps != args.eval_steps
        ):
            raise ValueError(
                f"{self._name}: load_best_model_at_end reloads the best checkpoint that was saved, "
                f"and with save_steps={args.save_steps}, eval_steps={args.eval_steps} most "
                'evaluations save none; use save_strategy="best" (with save_total_limit=1, say), '
                "or equal steps"
            )
        for phase in ("full", "sparse"):
            self._length(phase)
        # A mistake in what only sparse phases use must not show after the full one.
        if sft_args.gather not in ("step", "hook"):
            raise ValueError(
                f'{self._name}: gather must be "step" or "hook", got {sft_args.gather!r}'
            )
        for name, value in (
            ("learning_rate", args.learning_rate),
            ("sparse_learning_rate", sft_args.sparse_learning_rate),
            ("max_grad_norm", args.max_grad_norm),
        ):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{self._name}: {name} must be finite and ≥ 0, got {value}")

    def _check_evaluated(self) -> None:
        """Refuses phases that end before the first evaluation, where the best one decides."""
        args = self.args
        if not args.load_best_model_at_end:
            return
        for phase in ("full", "sparse"):
            length: float = self._length(phase).resolve(self._updates)
            unit = "steps"
            if args.eval_strategy == "epoch" and self._updates is not None:
                length, unit = length / self._updates, "epochs"
            if args.eval_delay > length:
                raise ValueError(
                    f"{self._name}: load_best_model_at_end, but a {phase} phase of {length:g} "
                    f"{unit} ends before its first evaluation (eval_delay={args.eval_delay}); "
                    "lower eval_delay, or train longer"
                )

    def _check_best(self, name: str) -> None:
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            raise ValueError(
                f"{self._name}: load_best_model_at_end, but no evaluation of {name} left a best "
                f"checkpoint in {self.args.output_dir} ({self.state.global_step} steps, "
                f"eval_strategy={self.args.eval_strategy.value!r}, eval_steps="
                f"{self.args.eval_steps}, best metric {self.state.best_metric}); evaluate more "
                "often, or see whether the metric is NaN"
            )

    def _check_run(self, folder: str, resume: bool) -> None:
        run = os.path.join(folder, RUN_NAME)
        if resume:
            if not os.path.exists(run):
                raise ValueError(
                    f"{self._name}.train: there is no run in {folder} to go on with; give the "
                    "output_dir of one, or leave resume_from_checkpoint out"
                )
            return
        inside = glob.escape(self.args.output_dir)
        checkpoints = [
            path
            for phase in ("full", "sparse")
            for path in glob.glob(os.path.join(inside, f"{phase}-[0-9]*", "checkpoint-[0-9]*"))
        ]
        if self._finished == folder:
            # Of other weights, perhaps: what the new run goes on from must be its own.
            for path in checkpoints if self.args.should_save else []:
                shutil.rmtree(path)
            return
        if os.path.exists(run):
            raise ValueError(
                f"{self._name}.train: {folder} holds {RUN_NAME} of an earlier run; "
                "train(resume_from_checkpoint=True) goes on with it, and to start over, remove it "
                "or give another output_dir"
            )
        result = os.path.join(folder, FILE_NAME)
        if found := [*checkpoints, *([result] if os.path.lexists(result) else [])]:
            raise ValueError(
                f"{self._name}.train: {found[0]} would be replaced, and no run there says that "
                "it may; give another output_dir, or remove it"
            )

    def _settings(self) -> dict[str, Any]:
        """What decides the result of a run, as JSON values."""
        args = self.args
        steps = [self._length(phase).resolve(self._updates) for phase in ("full", "sparse")]
        return {
            **{
                name: value
                for name, value in args.to_dict().items()
                if name not in _HARMLESS and not name.startswith(_HARMLESS_PREFIXES)
            },
            "world_size": args.world_size,
            "train_dataset": _sizes(self.train_dataset),
            "eval_dataset": _sizes(self.eval_dataset),
            "steps": steps,
            "warmup": [args.get_warmup_steps(n) for n in steps],
            "sparse_learning_rate": self.sft_args.sparse_learning_rate,
            "sources": {s: d.content_id for s, d in self._deltas.items()},
            "repeat": self._repeat,
        }

    def _metadata(self) -> dict[str, Any]:
        """The result's metadata; with several sources, all the SFTs that it was trained on."""
        sources = [delta for source, delta in self._deltas.items() if source != _SOURCE]
        if not sources:
            return self._meta
        return {"trained_on": trained_on(sources), **self._meta}


class LotteryTicketTrainer(LotteryTicketMixin, Trainer):
    """The Hugging Face Trainer, learning a sparse fine-tuning.

    `train()` runs all phases and returns one `TrainOutput`: the steps of all of them, and their
    metrics, each under its phase's name ("full-1_train_loss"). Then `delta` is the result, it lies
    in `output_dir` as `sft.safetensors`, and it is on the model, so that `evaluate()` and
    `predict()` are those of the tuned model; `model.save_pretrained` would save that, `save_model`
    saves the SFT. `base_model()` gives a block without it.

    Each phase has a Trainer's state of its own (`phase_states`), its checkpoints lie in
    `output_dir/full-1`, `output_dir/sparse-1` and so on, and with `load_best_model_at_end` its best
    checkpoint decides: the mask in a full phase, φ in a sparse one. The random state of each phase
    is that of `TrainingArguments.seed`. Logs have "l1", the value of the L1 term, and "moved", the
    share of the eligible entries that differ from θ0; "grad_norm" is the norm of the tuned
    gradients with the L1 term, before clipping.

    With a `train_dataset` that is a mapping of sources to data sets, each batch holds examples of
    one source, and that one's SFT is on the model while the batch is run. Where `eval_dataset` is
    such a mapping too, each is evaluated with its source's SFT, and their mean is added under the
    plain names ("eval_f1").

    Args:
        *args: As the Trainer's.
        sft_args: What to learn, and how.
        sources: Source → its SFT: a `SparseDelta`, what `SparseDelta.load` takes, or None.
        repeat: Source → passes over its data for each pass over all; default: 1.
        meta: Fields of the result's metadata, such as role, lang, task, license.
        ticket: Further arguments of `LotteryTicket`: eligible, include, exclude, l1_numel, a
            criterion that is no name, …
        **kwargs: As the Trainer's.

    Raises:
        ValueError: Settings that cannot work; the message says which.
    """


class _PhaseOver(Exception):
    """The checkpoint that a phase goes on from was its last one."""


class _Between(TrainerCallback):
    """What has to happen between the Trainer's own steps.

    Args:
        trainer: The trainer that this belongs to.
    """

    def __init__(self, trainer: LotteryTicketMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.phase is None or not state.global_step:
            return
        stored = state.stateful_callbacks.get("TrainerControl", {})
        if state.global_step >= state.max_steps or stored["args"]["should_training_stop"]:
            raise _PhaseOver

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        mixed = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if isinstance(mixed, MultiSource) and self.trainer._updates is not None:
            mixed.set_epoch(state.global_step // self.trainer._updates)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # transformers 4.57 does not, and phases shorter than eval_steps would have no best weights.
        if args.eval_strategy == "steps" and state.global_step >= max(
            state.max_steps, args.eval_delay
        ):
            control.should_evaluate = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        phase = self.trainer.phase
        if phase is not None and phase.name == "full":
            # L1 and clipping need true gradients; MaskedAdamW divides by the scale itself.
            self.trainer.accelerator.unscale_gradients()


def _folder(phase: Phase) -> str:
    return f"{phase.name}-{phase.iteration + 1}"


def _last_checkpoint(folder: str) -> str | None:
    """The last checkpoint that a phase can go on from; None where it begins anew."""
    steps = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "checkpoint-*")):
        number = path.rpartition("-")[2]
        if number.isdecimal() and _is_whole(path):
            steps[int(number)] = path
    return steps[max(steps)] if steps else None


def _is_whole(checkpoint: str) -> bool:
    """Whether a checkpoint was written to its end: the Trainer's state comes last."""
    try:
        with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        return False
    return all(os.path.isfile(os.path.join(checkpoint, name)) for name in _WHOLE)


def _in_phase(checkpoint: str, folder: str) -> str:
    """A checkpoint that the caller named, checked to be one of the phase that comes next."""
    if os.path.realpath(os.path.dirname(checkpoint.rstrip("/\\"))) != os.path.realpath(folder):
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} is none of the phase that the run is in, whose "
            f"checkpoints are in {folder}; pass one of those, or True for the last"
        )
    if not _is_whole(checkpoint):
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} is not complete; it must hold "
            f"{', '.join(_WHOLE)} and trainer_state.json"
        )
    return checkpoint


def _loaded(sft: SparseDelta | str | os.PathLike[str] | None) -> SparseDelta | None:
    return sft if sft is None or isinstance(sft, SparseDelta) else SparseDelta.load(sft)


def _as_it_is(batch: Any) -> Any:
    return batch


def _sizes(data: Any) -> Any:
    """Examples of a data set, or of each in a mapping; None where they are not counted."""
    if isinstance(data, Mapping):
        return {str(name): _sizes(own) for name, own in data.items()}
    try:
        return len(data)
    except TypeError:
        return None


def _mean(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of what all sources' evaluations have, but for their speed."""
    if not metrics:
        return {}
    shared = set.intersection(*(set(own) for own in metrics)) - _SPEED
    return {
        key: sum(own[key] for own in metrics) / len(metrics)
        for key in metrics[0]
        if key in shared and isinstance(metrics[0][key], (int, float))
    }
