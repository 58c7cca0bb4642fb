"""The training step on 1, 2 and 4 ranks: strong and weak scaling, and each collective against the planner's bytes.

What is measured. `Trainer.train_step` of `train_step.py`, its experts spread over all ranks, which are processes of
this machine. Strong: the batch of all ranks is the same whatever their number; weak: each rank's is. Columns:

- wall: median seconds of a step, of the slowest rank. Efficiency: of one rank the wall time, over that of n ranks and,
  for strong scaling, n. It says little where ranks share cores.
- work: the process time of all ranks together, over that of as many images on one rank: what spreading costs, whether
  or not each rank has a core of its own.
- collectives: of the first rank, a step, by kind and ranks of the group. Payload is what the rank hands over (of an
  all-gather, what it has in the end), planned what the planner says; sent follows from either by the direct all-to-all
  and rings. Seconds are in the call and in the wait for its end; the wait for ranks that come late is among them.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --size S --tokens 2048 --ranks 1 2 --models ours,parallel.expert=1
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
from collections import defaultdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.collectives import SENT, counted
from benchmarks.measuring import circumstances, process_and_wall_seconds, told
from benchmarks.train_step import SIZES, config_for, make_trainer, processes, tokens_of_image
from diffmoe_dist.config import Config
from diffmoe_dist.planning.accelerators import ACCELERATORS
from diffmoe_dist.planning.traffic import all_transfers
from diffmoe_dist.planning.workload import Cluster, workload

WARM_UP = 2


def _rank(connection: Connection, environment: dict[str, str], name: str, config: Config, rounds: int) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    from diffmoe_dist.parallel.topology import stop_process_group

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(name, config, Path(folder))
        for _ in range(WARM_UP):
            trainer.train_step()
        seconds = []
        for _ in range(rounds):
            torch.distributed.barrier()
            seconds.append(process_and_wall_seconds(trainer.train_step, trainer.topology.device))
        with counted() as counts:
            for _ in range(rounds):
                trainer.train_step()
        rows = [
            {"kind": kind, "group": ranks, "calls": count.calls / rounds, "payload": count.payload / rounds,
             "seconds": count.seconds / rounds}
            for (kind, ranks), count in sorted(counts.items())
        ]  # fmt: skip
        connection.send((seconds, rows))
        trainer.close()
    stop_process_group()


def run(model: str, size: str, tokens: int, ranks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model on so many ranks, `tokens` in all."""
    model = model if "parallel.expert=" in model or model == "dense" else f"{model},parallel.expert={ranks}"
    config = config_for(model, size, tokens, arguments.device, arguments.precision, ranks)
    context = processes(arguments.device)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"LOCAL_WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"}
    started = []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        given = (theirs, environment, model.split(",")[0], config, arguments.rounds)
        started.append((context.Process(target=_rank, args=given, daemon=True), ours))
        started[-1][0].start()
        theirs.close()
    found = [ours.recv() for _, ours in started]  # EOFError: the rank has failed, and has said why
    for process, _ in started:
        process.join()
    seconds, collectives = [of_rank for of_rank, _ in found], found[0][1]
    return {
        "model": model,
        "size": size,
        "ranks": ranks,
        "tokens": tokens,
        "wall": statistics.median(max(wall for _, wall in step) for step in zip(*seconds, strict=True)),
        "process": statistics.median(sum(own for own, _ in step) for step in zip(*seconds, strict=True)),
        "collectives": [row | _planned(config, ranks, row["kind"], row["group"]) for row in collectives],
    }


def _planned(config: Config, ranks: int, kind: str, group: int) -> dict[str, float]:
    """The planner's sums over the transfers of one kind in groups of one size."""
    cluster = Cluster(1, ranks, next(iter(ACCELERATORS.values())))
    transfers = [
        transfer
        for transfer in all_transfers(config, cluster, workload(config, ranks))
        if (transfer.kind, transfer.group_size) == (kind, group)
    ]
    return {
        "planned_calls": sum(transfer.calls for transfer in transfers),
        "planned_payload": sum(transfer.payload for transfer in transfers),
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| scaling | model | ranks | tokens | wall (s) | efficiency | work |", f"|{'---|' * 7}"]
    alone: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        name = row["model"].split(",")[0]
        one = alone.setdefault((row["scaling"], name), row)
        efficiency = one["wall"] / row["wall"] * row["tokens"] / one["tokens"] / row["ranks"] * one["ranks"]
        work = row["process"] / row["tokens"] / (one["process"] / one["tokens"])
        cells = [row["scaling"], name, row["ranks"], row["tokens"], f"{row['wall']:.3f}", f"{efficiency:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {work:.3f} |")
    return lines


def collectives_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| scaling | model | ranks | collective | over | calls | payload | planned | sent | ms |",
        f"|{'---|' * 10}",
    ]
    for row in rows:
        for one in row["collectives"]:
            sent = SENT[one["kind"]](one["group"]) * one["payload"]
            sizes = [f"{value / 1e6:.3f} MB" for value in (one["payload"], one["planned_payload"], sent)]
            cells = [row["scaling"], row["model"].split(",")[0], row["ranks"], one["kind"], one["group"]]
            cells += [f"{one['calls']:g}", *sizes, f"{one['seconds'] * 1e3:.1f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--precision", "--dtype", default="fp32", help="default: fp32")
    parser.add_argument("--size", choices=tuple(SIZES), default="XS", help="default: XS")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="ratios are to the first; 1 2 4")
    parser.add_argument("--tokens", type=int, default=1024, help="strong: of all ranks, weak: of each; default: 1024")
    parser.add_argument("--models", nargs="+", default=["ours"], metavar="NAME[,SETTING=VALUE]", help="default: ours")
    parser.add_argument("--rounds", type=int, default=7, help="to take the median of; default: 7")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there, too")
    arguments = parser.parse_args()
    if arguments.tokens % (tokens_of_image(arguments.size) * max(arguments.ranks)):
        parser.error(f"--tokens {arguments.tokens}: choose whole images for each of {max(arguments.ranks)} ranks")
    found: dict[str, Any] = {"benchmark": "scaling", **circumstances(torch.device(arguments.device))}
    found |= {"precision": arguments.precision, "threads": "1 a rank", "rows": []}
    print(f"{told(found)}, {arguments.precision}, {arguments.rounds} rounds\n")
    measured: dict[tuple[str, int, int], dict[str, Any]] = defaultdict(dict)
    for model in arguments.models:
        for scaling in ("strong", "weak"):
            for ranks in arguments.ranks:
                tokens = arguments.tokens * (ranks if scaling == "weak" else 1)
                case = (model, ranks, tokens)
                if not measured[case]:
                    measured[case] = run(model, arguments.size, tokens, ranks, arguments)
                found["rows"].append({"scaling": scaling, **measured[case]})
    print("\n".join([*table(found["rows"]), "", *collectives_table(found["rows"])]))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
