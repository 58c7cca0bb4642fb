"""Images in blocks: each block is sampled by one rank and is on the disk as soon as it is there.

Shape legend: N images, H = W image size, C channels.
"""

from __future__ import annotations

import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist

from diffmoe_dist.diffusion.objectives import Objective
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import write_npz
from diffmoe_dist.launch import Launch
from diffmoe_dist.logs import ProgressLog
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.parallel.topology import from_first_rank
from diffmoe_dist.sampling.conditions import Conditions
from diffmoe_dist.sampling.generate import Decode, Generated, NonFinite, SamplerSettings, generate, to_uint8


@dataclass(frozen=True)
class Block:
    """Images that are sampled together, or those of all blocks."""

    images_NHWC: np.ndarray  # uint8
    nfe: float  # for each image
    slots: float  # see `Generated`
    tokens: int
    seconds: float  # of the job: where n ranks sample at a time, a block counts one n-th of its time
    non_finite: NonFinite | None = None  # such a block is not kept


@dataclass(frozen=True)
class BlockSampler:
    """Samples images 0 to `num` - 1 in blocks of `batch_size`; a block is the same on any number of ranks."""

    model: DiT
    objective: Objective
    decode: Decode
    conditions: Conditions
    sampler: SamplerSettings
    num: int
    batch_size: int
    is_sharded: bool  # the experts: then every rank takes part in every block

    @property
    def starts(self) -> range:
        """The number of the first image of each block."""
        return range(0, self.num, self.batch_size)

    def numbers(self, start: int) -> list[int]:
        return list(range(start, min(start + self.batch_size, self.num)))

    def count(self, starts: list[int]) -> int:
        """The images of these blocks."""
        return sum(len(self.numbers(start)) for start in starts)

    def draw(self, start: int) -> Generated:
        """The block that begins with image `start`, as the model makes it: not decoded."""
        return generate(self.model, self.objective, self.numbers(start), self.conditions, self.sampler)

    def sample_block(self, start: int, at_once: int) -> Block:
        """The block that begins with image `start`, while `at_once` ranks sample a block each."""
        begun = time.perf_counter()
        sampled = self.draw(start)
        pixels = to_uint8(self.decode(sampled.images))
        seconds = (time.perf_counter() - begun) / at_once
        return Block(pixels, sampled.nfe, sampled.slots, sampled.tokens, seconds, sampled.non_finite)


def sample_missing_blocks(sampler: BlockSampler, folder: Path, launch: Launch) -> None:
    """Sample the blocks that are not in `folder` yet; collective. The ranks take the missing blocks in turn.

    Raises:
        UserError: what other ranks wrote cannot be seen.
        FloatingPointError: images are not finite; on every rank.
    """
    missing = from_first_rank(_missing(sampler, folder))
    with ProgressLog(sampler.num, sampler.num - sampler.count(missing), launch.rank == 0) as progress:
        for begin in range(0, len(missing), launch.world_size):
            at_once = missing[begin : begin + launch.world_size]
            non_finite = None
            if launch.rank < len(at_once):
                start = at_once[launch.rank]
                block = sampler.sample_block(start, len(at_once))
                non_finite = block.non_finite
                if non_finite is None:
                    write_block(block_path(folder, start), block)
            elif sampler.is_sharded:  # the others need this rank's experts
                sampler.sample_block(at_once[0], len(at_once))
            _stop_where_not_finite(non_finite)
            progress.advance(sampler.count(at_once))
    dist.barrier()
    left = from_first_rank(_missing(sampler, folder))
    if left:
        raise UserError(f"--out {folder.parent}: {len(left)} blocks are not there; use a disk that all ranks share")


def _stop_where_not_finite(of_this_rank: NonFinite | None) -> None:
    found: list[NonFinite | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, of_this_rank)
    bad = [non_finite for non_finite in found if non_finite is not None]
    if bad:
        first = min(bad, key=lambda non_finite: non_finite.first)
        total = replace(first, images=sum(non_finite.images for non_finite in bad))
        raise FloatingPointError(not_finite(total))


def not_finite(images: NonFinite) -> str:
    """For a message."""
    return (
        f"sampling: {images}; nothing of their blocks is kept. Do the weights come from a run that diverged, or is "
        "the guidance scale too large?"
    )


def join_blocks(sampler: BlockSampler, folder: Path) -> Block:
    """All blocks, which are all there, as one; its NFE is the mean over the images.

    Raises:
        UserError: a block is damaged.
    """
    first = read_block(block_path(folder, 0))
    images_NHWC = np.empty((sampler.num, *first.images_NHWC.shape[1:]), dtype=np.uint8)
    nfe = slots = seconds = 0.0
    tokens = 0
    for start in sampler.starts:
        block = read_block(block_path(folder, start))
        images_NHWC[start : start + len(block.images_NHWC)] = block.images_NHWC
        slots, tokens, seconds = slots + block.slots, tokens + block.tokens, seconds + block.seconds
        nfe += block.nfe * len(block.images_NHWC)
    return Block(images_NHWC, nfe / sampler.num, slots, tokens, seconds)


def block_path(folder: Path, start: int) -> Path:
    return folder / f"block-{start:08d}.npz"


def write_block(path: Path, block: Block) -> None:
    """All of it or nothing."""
    counts = np.array([block.nfe, block.slots, block.tokens, block.seconds], dtype=np.float64)
    write_npz(path, images=block.images_NHWC, counts=counts)


def read_block(path: Path) -> Block:
    """Raises UserError for a file that is damaged."""
    try:
        with np.load(path) as file:
            nfe, slots, tokens, seconds = file["counts"].tolist()
            return Block(file["images"], nfe, slots, int(tokens), seconds)
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and run the command again") from None


def _missing(sampler: BlockSampler, folder: Path) -> list[int]:
    there = set(folder.glob("block-*.npz"))
    return [start for start in sampler.starts if block_path(folder, start) not in there]
