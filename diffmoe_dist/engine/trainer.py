"""The training loop.

Shape legend: L mixture-of-experts layers, N experts.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe_dist.config import Config, learning_rate, loss_weights
from diffmoe_dist.data.batch import Batch
from diffmoe_dist.data.loader import BatchLoader
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.engine.checkpointer import Checkpointer
from diffmoe_dist.engine.compiling import CompileClock
from diffmoe_dist.engine.ema import WeightAverages
from diffmoe_dist.engine.event_file import Histogram
from diffmoe_dist.engine.noising import noisy_inputs, with_one_time
from diffmoe_dist.engine.non_finite import find_origin, keep_sample_ids
from diffmoe_dist.engine.profiling import Profiler, Timings
from diffmoe_dist.engine.progress import Progress
from diffmoe_dist.engine.routing_stats import GATE_BUCKETS, PREFIX, Observed, observed, relative_load, routing_metrics
from diffmoe_dist.engine.run_folder import Claim
from diffmoe_dist.engine.run_log import Log, open_run_log
from diffmoe_dist.engine.sharded_state import Fragment, ShardedState, buffers
from diffmoe_dist.engine.thresholds import proposed_thresholds, thresholds_of_average
from diffmoe_dist.engine.watchdog import SLOW_FACTOR, Watchdog, collective_timeout
from diffmoe_dist.logs import logger
from diffmoe_dist.model.accounting import account
from diffmoe_dist.model.dit import DiT, DiTOutput
from diffmoe_dist.model.routing import RoutingStats
from diffmoe_dist.parallel.dispatch import AllToAllDispatcher
from diffmoe_dist.parallel.topology import Topology, on_first_rank
from diffmoe_dist.planning.accelerators import device_peak, model_flop_utilization

THRESHOLD_STEPS = 8  # of which the batches give the thresholds of the averaged weights, once, at the end


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step of the whole job did; global-batch values, the same on every rank."""

    losses: dict[str, float]  # `loss`, then its parts, unweighted
    grad_norm: float  # before clipping
    thresholds_LN: Tensor | None  # proposals, mean over pools, of routers that propose some; on the device
    load_LN: Tensor  # assignments a micro-step and rank; on the host
    capacity_L: Tensor  # C of DiffMoE eq. 8-9; on the host
    routing: dict[str, Tensor]  # what else is known of the routers, in a step that is logged; on the host
    bad_samples: int  # did not decode and were passed over
    stop_asked: bool  # of any rank

    @property
    def non_finite(self) -> list[str]:
        """What is not finite; if anything is not, the update was left out."""
        values = {**self.losses, "grad_norm": self.grad_norm}
        return [name for name, value in values.items() if not math.isfinite(value)]


@dataclass(frozen=True)
class Periodic:
    """What a run does with its averaged model every so many steps, besides training it."""

    name: str  # of its deadline
    every: int  # steps
    run: Callable[[DiT], Any]  # collective
    # Writes down what `run` has returned in this step. None: it returns values that join the step's line of metrics.
    record: Callable[[Log, Any, int], None] | None = None
    in_training_mode: bool = False  # of the model meanwhile


@dataclass(frozen=True)
class RunGuards:
    """What may end a run before its last step."""

    claim: Claim  # to the run folder
    stop_asked: Callable[[], bool]  # by a signal
    watchdog: Watchdog


class Trainer:
    """Takes optimizer steps until `train.steps`; its whole state is `state`, the model's buffers and `progress`."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        engine: Any,
        state: ShardedState,
        loader: BatchLoader,
        progress: Progress,
        periodic: Sequence[Periodic],
        guards: RunGuards,
    ) -> None:
        """
        Args:
            engine: DeepSpeed's, around a `DiT`.
            progress: where the run stands; `state` and `loader` stand there too.
            periodic: in the order in which they are done.
        """
        self.config = config
        self.topology = topology
        self.engine = engine
        self.model: DiT = engine.module
        self.objective = build_objective(config)
        self.state = state
        self.averages = WeightAverages(state, config.ema)
        self.loader = loader
        self.batches = iter(loader)
        self.progress = progress
        self.periodic = periodic
        self.guards = guards
        self.set_deadline = guards.watchdog.set_deadline
        self.run_dir = Path(config.run_dir)
        self.log = open_run_log(config, topology.rank, progress.step)
        self.loss_weights = loss_weights(config)
        self.timer = StepTimer()
        self.accounting = account(config)
        self.device_peak = device_peak(topology.device, config)
        self.thresholds_of_average: list[Fragment] = []  # once the last step is done
        self.bad_samples = 0  # since the last line of metrics
        self.timings = Timings(topology.device)
        self.compile_clock = CompileClock() if config.train.compile else None
        for layer in self.model.moe_layers:
            if isinstance(layer.dispatcher, AllToAllDispatcher):
                layer.dispatcher.timed = partial(self.timings.part, "all_to_all")
        self.profiler = Profiler(config.profile, self.run_dir, topology.rank, topology.device)
        timeout = collective_timeout(config.train.hang_timeout)
        self.checkpointer = Checkpointer(
            config, topology.device, guards.claim, progress.step, timeout, loader.class_names
        )

    def train(self) -> bool:
        """Returns whether train.steps was reached; else the run was asked to stop. Everything is saved either way."""
        begun, steps = self.progress.step, self.config.train.steps
        if begun >= steps:
            logger.info("already at step %d of train.steps=%d: nothing to do", begun, steps)
        else:
            self.guards.claim.mark_going_on()
        end = begun if on_first_rank(self.guards.claim.stop_asked) else steps  # a STOP that was left over costs no step
        for step in range(begun + 1, end + 1):
            # The first step allocates, and on a GPU compiles.
            self.set_deadline(f"step {step}", SLOW_FACTOR if step == begun + 1 else 1)
            with self.timer, self.profiler.step(step):
                report = self.train_step()
            if step == steps:
                self._find_thresholds()
            self._tell_compiling(step)
            self.log.step(step)
            self._do_what_is_due(report)
            if report.stop_asked:
                break
        self.save_now()
        step = self.progress.step
        if step < steps:
            claim = self.guards.claim
            why = f"{self.run_dir}/STOP asks: remove it before the next start" if claim.stop_asked() else "asked"
            logger.info("stopped at step %d of %d, everything is saved, as %s", step, steps, why)
            return False
        self.guards.claim.mark_done(step)
        return True

    def train_step(self) -> StepReport:
        """One optimizer step over the global batch; collective."""
        for layer in self.model.moe_layers:
            layer.router.start_step(self.progress.step)
        batches: list[Batch] = []
        micro_steps: list[dict[str, Tensor]] = []
        while len(micro_steps) < self.progress.micro_steps:
            if micro_steps:
                self.engine.step()  # between micro-steps it only counts
            with self.timings.part("data"):
                batches.append(self._next_batch())
                batch = batches[-1].to(self.topology.device)
            micro_steps.append(self._forward_backward(batch))
        report = self._update(micro_steps)
        self.bad_samples += report.bad_samples
        skipped = int(bool(report.non_finite))
        if skipped:
            self._handle_non_finite(report, batches)
        else:
            if report.thresholds_LN is not None:
                for layer, proposal in zip(self.model.moe_layers, report.thresholds_LN, strict=True):
                    layer.router.update_threshold(proposal)
            self.averages.update(self.progress.updates + 1)
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            images_seen=self.progress.images_seen + self.config.train.global_batch_size,
            skipped=self.progress.skipped + skipped,
        )
        return report

    def _next_batch(self, steps_ahead: int = 0) -> Batch:
        batch = next(self.batches)
        if self.config.objective.same_t_per_batch:
            images_seen = self.progress.images_seen + steps_ahead * self.config.train.global_batch_size
            batch = with_one_time(batch, self.config.seed, images_seen)
        return batch

    def save(self) -> None:
        """Begin to write a checkpoint; collective. Training goes on meanwhile."""
        self.set_deadline("saving a checkpoint", SLOW_FACTOR)
        fragments = list(self.state.fragments())
        if self.topology.rank == 0:  # the same on every rank, so one writes them
            fragments += buffers(self.model) + self.thresholds_of_average
        with self.timings.part("checkpoint"):
            self.checkpointer.save(fragments, self.progress)

    def save_now(self) -> None:
        """Return when the state is saved; collective."""
        if self.checkpointer.last != self.progress.step:
            self.save()
        self.set_deadline("saving a checkpoint", SLOW_FACTOR)
        with self.timings.part("checkpoint"):
            self.checkpointer.wait(must_succeed=True)

    def close(self) -> None:
        self.set_deadline("the end", SLOW_FACTOR)
        self.checkpointer.close()
        self.profiler.close()
        if self.compile_clock is not None:
            self.compile_clock.close()
        self.loader.close()
        self.log.close()

    def _find_thresholds(self) -> None:
        """Those of the averaged weights, on the batches that the next steps would have; collective."""
        experts = self.config.experts
        if experts is None or not experts.has_predictor():
            return
        self.set_deadline("finding capacity thresholds", SLOW_FACTOR)
        steps = range(THRESHOLD_STEPS)
        batches = (self._next_batch(ahead) for ahead in steps for _ in range(self.progress.micro_steps))
        routers = [layer.router for layer in self.model.moe_layers]
        with self.averages.applied(), self.timings.left_out():
            for router in routers:
                router.end_schedule()  # inference is at the last capacity, whatever that of this step was
            thresholds_LN = proposed_thresholds(self.model, self.config, batches)
            for router in routers:
                router.start_step(self.progress.step - 1)
        self.thresholds_of_average = thresholds_of_average(self.model, self.topology.mean(thresholds_LN))
        logger.info("found the capacity thresholds of the averaged weights on %d batches", len(steps))

    def _tell_compiling(self, step: int) -> None:
        if self.compile_clock is not None and (seconds := self.compile_clock.since_last()):
            logger.info("step %d: torch.compile took %.1f s", step, seconds)

    def _do_what_is_due(self, report: StepReport) -> None:
        """After a step: periodic jobs, metrics, a checkpoint. A run that was asked to stop only logs and saves."""
        step, config = self.progress.step, self.config
        due = [] if report.stop_asked else [job for job in self.periodic if _due(step, job.every)]
        measured: dict[str, float | None] = {}
        for job in due:
            if job.record is None:
                measured |= self._run_with_average(job)
        if measured or _due(step, config.log.every) or step == config.train.steps:
            self._log_step(report, measured)
        for job in due:
            if job.record is not None:
                job.record(self.log, self._run_with_average(job), step)
        if _due(step, config.checkpoint.every):
            self.save()

    def _run_with_average(self, job: Periodic) -> Any:
        self.set_deadline(job.name, SLOW_FACTOR)
        self.model.train(job.in_training_mode)
        with self.averages.applied(), self.timings.left_out():
            result = job.run(self.model)
        self.model.train()
        return result

    def _log_step(self, report: StepReport, measured: dict[str, float | None]) -> None:
        if report.non_finite:
            if measured:
                values = ", ".join(f"{name} {value}" for name, value in measured.items())
                logger.warning("step %d was skipped and has no line of metrics: %s", self.progress.step, values)
            return
        self.log.metrics(self._metrics(report) | measured)
        if len(report.load_LN):
            self.log.load(self._load(report))
            self.log.histograms(self._histograms(report), self.progress.step)

    def _forward_backward(self, batch: Batch) -> dict[str, Tensor]:
        """One micro-step. Returns what is to be averaged over micro-steps and ranks, detached."""
        with self.timings.part("forward"), self._observed(batch) as of_routers:
            losses, stats = self._losses(batch, self.engine)
        with self.timings.part("backward"):
            self.engine.backward(losses["loss"])
        proposals = [s.proposed_threshold for s in stats if s.proposed_threshold is not None]
        tables = {"threshold": proposals, "load": [s.tokens_per_expert for s in stats]}
        tables |= {"capacity": [s.capacity for s in stats]}
        values = {**losses, "bad": batch.bad.sum(), **({} if of_routers is None else of_routers.sums())}
        values |= {name: torch.stack(layers) for name, layers in tables.items() if layers}
        return {name: value.detach() for name, value in values.items()}

    def _observed(self, batch: Batch) -> AbstractContextManager[Observed | None]:
        """The routers are observed in the steps that are logged."""
        step = self.progress.step + 1
        is_logged = step == self.config.train.steps or _due(step, self.config.log.every)
        if not is_logged or not self.model.moe_layers:
            return nullcontext()
        has_thresholds = self.progress.updates > 0 or self.config.train.initial_weights is not None
        noise_B = self.objective.noise_level(self.objective.times(batch.time_uniform))
        return observed(self.model, noise_B, has_thresholds)

    def _losses(self, batch: Batch, model: Callable[..., DiTOutput]) -> tuple[dict[str, Tensor], list[RoutingStats]]:
        """`loss`, then its parts, unweighted; and the statistics of the layers."""
        z, t, y = noisy_inputs(batch, self.objective, self.config)
        output = model(z, self.objective.model_time(t), y)
        of_images = self.objective.losses(output.prediction, output.variance, batch.images, batch.noise, t)
        parts = {name: of_images[name].mean() for name in self.objective.loss_names}
        loss = torch.stack(list(parts.values())).sum()
        for name, weight in self.loss_weights.items():
            parts[name] = output.losses[name]
            loss = loss + weight * parts[name]
        return {"loss": loss, **{f"loss_{name}": value for name, value in parts.items()}}, output.routing

    def _loss_again(self, batch: Batch) -> Tensor:
        return self._losses(batch.to(self.topology.device), self.model)[0]["loss"]

    def _update(self, micro_steps: list[dict[str, Tensor]]) -> StepReport:
        """Average over micro-steps and ranks, and update the weights if all of it is finite; collective.

        One reduction, and one copy that the host waits for: before the optimizer, whose passes over the weights then
        leave it time to prepare the next step.
        """
        guards = self.guards
        stop_asked = guards.stop_asked() or guards.claim.stop_asked()
        shapes = {name: value.shape for name, value in micro_steps[0].items()} | dict.fromkeys(
            ("stop", "squares"), torch.Size()
        )
        flat = torch.stack([torch.cat([v.double().flatten() for v in step.values()]) for step in micro_steps])
        last = [flat.new_full((1,), float(stop_asked)), self.state.gradient_squares().view(1)]
        on_device = self.topology.mean(torch.cat([flat.mean(dim=0), *last]))
        here, means = _split(on_device, shapes), _split(on_device.cpu(), shapes)
        losses = {name: float(value) for name, value in means.items() if name.startswith("loss")}
        nothing = torch.empty(0, 0)
        report = StepReport(
            losses=losses,
            grad_norm=math.sqrt(float(means["squares"]) * self.topology.world_size),
            thresholds_LN=here["threshold"].float() if "threshold" in here else None,
            load_LN=means.get("load", nothing),
            capacity_L=means.get("capacity", nothing),
            routing={name: value for name, value in means.items() if name.startswith(PREFIX)},
            bad_samples=round(float(means["bad"]) * self.topology.world_size * self.progress.micro_steps),
            stop_asked=bool(means["stop"] > 0),
        )
        with self.timings.part("checkpoint"):
            self.checkpointer.wait_staged()
        self.state.set_norm(report.grad_norm, skip=bool(report.non_finite))
        self.state.set_learning_rate(learning_rate(self.config, self.progress.step + 1))
        with self.timings.part("optimizer"):
            self.engine.step()
        return report

    def _handle_non_finite(self, report: StepReport, batches: list[Batch]) -> None:
        """Log where it began and keep the batch's sample ids; stop there unless the run skips such steps. Collective.

        Raises:
            FloatingPointError: on every rank, once the last valid state is saved.
        """
        step = self.progress.step + 1
        self.set_deadline(f"looking for what is not finite in step {step}", SLOW_FACTOR)
        origin = find_origin(self.model, [partial(self._loss_again, batch) for batch in batches])
        unknown = "in no output or gradient when computed again: look at the hardware, or for a kernel that varies"
        where = f"first in {origin}" if origin else unknown
        what = f"step {step}: {', '.join(report.non_finite)} not finite, {where}"
        ids = keep_sample_ids(self.run_dir / "non_finite", step, what, batches)
        if self.config.train.skip_non_finite:
            logger.warning("%s; its update is skipped, its sample ids are in %s", what, ids)
            return
        self.save_now()
        raise FloatingPointError(
            f"{what}; the weights are still those of step {self.progress.step}, and saved; the batch's sample ids are "
            f"in {ids}; train.skip_non_finite=true would leave such updates out"
        )

    def _metrics(self, report: StepReport) -> dict[str, Any]:
        steps = self.timer.steps
        seconds = self.timer.mean_since_last()
        load_LN = report.load_LN
        capacity = load_max = load_min = None
        bad_samples, self.bad_samples = self.bad_samples, 0
        if len(load_LN):
            capacity = float(report.capacity_L.mean())
            relative_LN = relative_load(load_LN)
            load_max, load_min = float(relative_LN.max()), float(relative_LN.min())
        images_per_second = self.config.train.global_batch_size / seconds
        mfu = {}
        if self.device_peak is not None:
            flops = self.accounting.training_flops(capacity or 0.0)
            mfu["mfu"] = model_flop_utilization(flops, images_per_second, self.topology.world_size, self.device_peak)
        return {
            "step": self.progress.step,
            "images_seen": self.progress.images_seen,
            "ranks": self.topology.world_size,
            **report.losses,
            "grad_norm": report.grad_norm,
            "lr": learning_rate(self.config, self.progress.step),
            "images_per_second": images_per_second,
            "step_seconds": seconds,
            **mfu,
            "capacity": capacity,
            "expert_load_max": load_max,
            "expert_load_min": load_min,
            **(routing_metrics(report.routing, load_LN) if report.routing else {}),
            "bad_samples": bad_samples,
            "peak_memory_bytes": _peak_memory(self.topology.device),
            "skipped_steps": self.progress.skipped,
            "failed_checkpoints": self.checkpointer.failed,
            **self.timings.mean_since_last(steps),
        }

    def _histograms(self, report: StepReport) -> dict[str, Histogram]:
        """By layer: the load of each expert, and the gates of the tokens that were chosen."""
        loads = {"load": report.load_LN, "load_by_predictor": report.routing.get(f"{PREFIX}predicted")}
        gates_LH = report.routing.get(f"{PREFIX}gates")
        found = {}
        for layer, block in enumerate(self.config.moe_blocks):
            for name, load_LN in loads.items():
                if load_LN is not None:
                    experts = range(load_LN.shape[1] + 1)
                    found[f"{name}/block_{block}"] = Histogram(load_LN[layer].tolist(), [n - 0.5 for n in experts])
            if gates_LH is not None:
                edges = [bucket / GATE_BUCKETS for bucket in range(GATE_BUCKETS + 1)]
                found[f"gates/block_{block}"] = Histogram(gates_LH[layer].tolist(), edges)
        return found

    def _load(self, report: StepReport) -> dict[str, Any]:
        """Of each layer the capacity, and of each of its experts the tokens over the layer's mean."""
        relative = [[round(value, 4) for value in layer] for layer in relative_load(report.load_LN).tolist()]
        return {"step": self.progress.step, "capacity": report.capacity_L.tolist(), "load": relative}


def _split(flat: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


class StepTimer:
    """Mean wall-clock seconds of the steps since the last question."""

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, 0

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self.begun
        self.steps += 1

    def mean_since_last(self) -> float:
        mean = self.seconds / self.steps
        self.seconds, self.steps = 0.0, 0
        return mean


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process's largest resident size otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
