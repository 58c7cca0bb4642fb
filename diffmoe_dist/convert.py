"""Read published weights, export ours: `python -m diffmoe_dist.convert --from LAYOUT FILE --config FILE --out DIR`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from diffmoe_dist.command import CommandParser, run_command
from diffmoe_dist.config import let_router_run, load_config
from diffmoe_dist.errors import UserError

DESCRIPTION = """\
Make a folder of weights (model.safetensors and config.json) from a file of a published code base or from a checkpoint
of our own. load_model, diffmoe_dist.sample --checkpoint and train.initial_weights take such a folder.

  python -m diffmoe_dist.convert --from dit DiT-XL-2-256x256.pt --config FILE --out weights/dit-xl
  python -m diffmoe_dist.convert --from diffmoe 0700000.pt --config FILE moe.inference=count --out weights/diffmoe
  python -m diffmoe_dist.convert --from promoe ckpt_step_500000.pth --config FILE --weights ema --out weights/promoe
  python -m diffmoe_dist.convert --inspect ckpt_step_500000.pth > promoe.yaml
  python -m diffmoe_dist.convert --to safetensors --checkpoint runs/demo --out weights/demo
  python -m diffmoe_dist.convert --to diffmoe --checkpoint runs/demo --out demo.pt
  python -m diffmoe_dist.convert --to safetensors --checkpoint runs/demo --ema-length 0.13 --out weights/demo-0.13
  python -m diffmoe_dist.convert --to diffusers --checkpoint runs/demo --samples samples/demo --out pipelines/demo
  python -m diffmoe_dist.convert --from diffusers pipelines/demo --out weights/demo

--from says whose names the file uses: dit (DiT, SiT), diffmoe (DiffMoE and its dense, TC-DiT and EC-DiT baselines,
those that ProMoE's code trains too) or promoe. --config FILE [key=value ...] says which model it holds. Every tensor
must be used and none may be missing; the first that does not fit is named, and nothing is written. What tensors do not
show is yours to set:
  model.num_heads, where there is no QK-norm; model.learn_sigma=true (published models have learned variances)
  objective.*: DiT's have name=ddpm, DiffMoE's direction=data_at_one and time_scale=1, ProMoE's noise_at_one and 1000
  moe.top_k, moe.scores, moe.capacity; moe.inference=count, the rule of DiffMoE's published code
moe.threshold_decay is taken from the file. The averaged thresholds of a young DiffMoE file are too low, for its code
averages them twice, starting from zero; diffmoe_dist.sample --recalibrate finds them anew, and moe.inference=static
or constant does not use them.

--inspect FILE prints the configuration of the model that a file holds, from the names and shapes of its tensors; what
they do not show is marked, with what it is taken from.

--to dit, diffmoe or promoe writes a file that the published code loads, of a checkpoint or of a folder of weights; a
model that the code cannot build is refused.

--to diffusers writes a folder for diffmoe_dist.DiffMoEPipeline.from_pretrained, with the autoencoder (--decoder, or the
run's own), the text encoder (--encoder), and a model card that has measured C and scores from the --samples of
diffmoe_dist.sample and evaluate. A dense model of latents that DDPM has trained is one of diffusers' own DiTPipeline.
--from diffusers DIR reads such a folder, and published DiT pipelines; it has its settings, and needs no --config.

--upcycle starts a mixture of experts from a dense model: --from dit FILE --config MOE_CONFIG. The experts of a layer
are all copies of that block's feed-forward layer, the shared and the unconditional one too; the routers start as the
seed says. Where a token's gates do not add up to 1, as they do with token_choice and top_k=num_experts, the start is
not what the dense model computes, and the loss begins higher. FILE may also be the model.safetensors of a dense run of
ours. Train on with train.initial_weights=DIR.

--ema-length makes the average of the weights by a power function, after the run (EDM2): L is the standard deviation
of the steps it is of, as a part of all. A run with ema.lengths=[0.05,0.1] keeps two such averages in each checkpoint,
and those of all its checkpoints up to the given one are combined. How far the result is apart from the average that
was asked for is told; beyond 10 % it is refused: checkpoint.keep_every keeps more checkpoints.

Files are read without executing anything in them.
"""
TARGETS = ("safetensors", "dit", "diffmoe", "promoe", "diffusers")
OF_DIFFUSERS = {
    "decoder": "the autoencoder of a model of latents (default: the run's own)",
    "encoder": "the text encoder that the model was trained with",
    "tokenizer": "and its tokenizer, where it lies elsewhere",
    "samples": "images that diffmoe_dist.sample has made, and evaluate's scores.json beside them, for the model card",
}


def main() -> None:
    arguments = _parse()
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed need not look for a GPU, nor print that there is none
    if arguments.inspect is not None:
        _inspect(arguments)
    elif arguments.published is None:
        _export(arguments)
    else:
        _convert(arguments)


def _parse() -> argparse.Namespace:
    parser = CommandParser(prog="diffmoe_dist.convert", description=DESCRIPTION)
    parser.add_argument(
        "--from",
        dest="published",
        nargs=2,
        metavar=("LAYOUT", "FILE"),
        help="dit, diffmoe, promoe or diffusers, and the file or folder",
    )
    parser.add_argument("--config", metavar="FILE", help="with --from: YAML settings of the model; configs/ has some")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    parser.add_argument("--upcycle", action="store_true", help="with --from dit: make the experts of dense layers")
    parser.add_argument("--inspect", metavar="FILE", help="print the configuration of the model that a file holds")
    parser.add_argument("--to", choices=TARGETS, help="export weights of our own")
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="with --to: a run folder (its newest), a step folder, or a folder of weights",
    )
    parser.add_argument(
        "--weights", choices=["ema", "model"], help="averaged or not, where there are both (default: ema)"
    )
    parser.add_argument("--ema-decay", type=float, metavar="D", help="with --to safetensors: another of ema.decays")
    parser.add_argument(
        "--ema-length",
        type=float,
        metavar="L",
        help="with --to safetensors: an average of any length, of a run with ema.lengths",
    )
    for name, what in OF_DIFFUSERS.items():
        parser.add_argument(f"--{name}", metavar="DIR", help=f"with --to diffusers: {what}")
    parser.add_argument(
        "--out", metavar="DIR", help="a folder that does not exist yet, or an empty one; with --to dit and such, a file"
    )
    arguments = parser.parse_intermixed_args()
    if sum(given is not None for given in (arguments.published, arguments.to, arguments.inspect)) != 1:
        raise UserError(
            f"give one of --from {{dit,diffmoe,promoe,diffusers}} FILE, --to {{{','.join(TARGETS)}}} and --inspect "
            "FILE; see diffmoe_dist.convert --help"
        )
    for name in OF_DIFFUSERS:
        if getattr(arguments, name) is not None and arguments.to != "diffusers":
            raise UserError(f"--{name} has no effect without --to diffusers; leave it out")
    if arguments.inspect is None and arguments.out is None:
        raise UserError("--out is not set; give where to write")
    return arguments


def _inspect(arguments: argparse.Namespace) -> None:
    given = {
        "--config": arguments.config,
        "--upcycle": arguments.upcycle,
        "--checkpoint": arguments.checkpoint,
        "--ema-decay": arguments.ema_decay is not None,
        "--ema-length": arguments.ema_length is not None,
        "--out": arguments.out,
        **{override: True for override in arguments.overrides},
    }
    for name, value in given.items():
        if value:
            raise UserError(f"{name} has no effect with --inspect, which prints what a file holds; leave it out")

    from diffmoe_dist.engine.conversion import inspect_published

    sys.stdout.write(inspect_published(Path(arguments.inspect), arguments.weights))


def _export(arguments: argparse.Namespace) -> None:
    for name, given in {"--config": arguments.config, "--upcycle": arguments.upcycle}.items():
        if given:
            raise UserError(f"{name} has no effect with --to, whose checkpoint has its settings; leave it out")
    arguments.overrides = let_router_run(arguments.overrides)
    if arguments.overrides:
        raise UserError(f"{arguments.overrides[0]} has no effect with --to; leave it out")
    given = [name for name in ("weights", "ema_decay", "ema_length") if getattr(arguments, name) is not None]
    if len(given) > 1:
        first, second = (f"--{name.replace('_', '-')}" for name in given[:2])
        raise UserError(f"{first} and {second}: each chooses the weights; give one of them")
    if arguments.checkpoint is None:
        raise UserError(f"--to {arguments.to} needs --checkpoint DIR, a run folder or a step folder")

    from diffmoe_dist.engine.conversion import export_checkpoint

    what = arguments.weights or "ema"
    out, decay, length = Path(arguments.out), arguments.ema_decay, arguments.ema_length
    if arguments.to == "safetensors":
        source, made = export_checkpoint(arguments.checkpoint, out, arguments.weights, decay, length)
        if decay is not None:
            what = f"average with decay {decay:g}"
        if made is not None:
            what = f"average of length {length:g}, of {len(made.sources)} stored ones, {made.error:.2%} apart from it"
    else:
        source, opens = _export_elsewhere(arguments, out, given)
        what += opens
    sys.stdout.write(f"{source} ({what}) is now in {arguments.out}\n")


def _export_elsewhere(arguments: argparse.Namespace, out: Path, given: list[str]) -> tuple[Path, str]:
    """The folder that was read, and what opens what was written, for the message."""
    if given and given != ["weights"]:
        raise UserError(
            f"--{given[0].replace('_', '-')} has no effect with --to {arguments.to}; make a folder of that average by "
            "--to safetensors, and give it as --checkpoint"
        )
    if arguments.to == "diffusers":
        from diffmoe_dist.library.export import Parts, export_pipeline

        parts = Parts(**{name: getattr(arguments, name) for name in OF_DIFFUSERS})
        source, opens = export_pipeline(arguments.checkpoint, out, arguments.weights, parts)
        return source, f", for {opens}"

    from diffmoe_dist.engine.conversion import export_published

    return export_published(arguments.to, arguments.checkpoint, out, arguments.weights), ""


def _convert(arguments: argparse.Namespace) -> None:
    layout, file = arguments.published
    for name in ("checkpoint", "ema_decay", "ema_length"):
        if getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} has no effect with --from, which names its file; leave it out")
    if layout == "diffusers":
        _convert_diffusers(arguments, Path(file))
        return
    if arguments.config is None:
        raise UserError(f"--from {layout} needs --config FILE, the settings of the model that {file} holds")
    config = load_config(arguments.config, arguments.overrides, training=False)

    from diffmoe_dist.engine.conversion import convert_published

    taken = convert_published(layout, Path(file), config, Path(arguments.out), arguments.weights, arguments.upcycle)
    sys.stdout.write(f"{file}{'' if taken == 'only' else f' ({taken})'} is now in {arguments.out}\n")


def _convert_diffusers(arguments: argparse.Namespace, folder: Path) -> None:
    config = None
    if arguments.upcycle:
        if arguments.config is None:
            raise UserError("--upcycle needs --config FILE, the mixture of experts that the model is to become")
        config = load_config(arguments.config, arguments.overrides, training=False)
    else:
        unused = let_router_run(arguments.overrides)
        unused += ["--config"] if arguments.config else []
        unused += [f"--weights {arguments.weights}"] if arguments.weights else []
        if unused:
            raise UserError(
                f"{unused[0]} has no effect with --from diffusers, whose folder has its settings; leave it out"
            )

    from diffmoe_dist.engine.conversion import convert_diffusers

    convert_diffusers(folder, config, Path(arguments.out))
    sys.stdout.write(f"{folder} is now in {arguments.out}\n")


def run() -> NoReturn:
    """`diffmoe-convert`."""
    run_command(main)


if __name__ == "__main__":
    run()
