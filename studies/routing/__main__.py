"""The commands of the study."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffmoe_dist.command import CommandParser, run_command
from diffmoe_dist.logs import logger, set_up_logging
from studies.routing import classifier, driver, larger, picture, plots, report, timing
from studies.routing.images import read_images
from studies.routing.results import RESULTS, write_result
from studies.routing.systems import SYSTEMS, Run

PAGE = Path(__file__).parents[2] / "docs/study.md"
MIDDLE_LAYER = 1  # of three


def parse() -> argparse.Namespace:
    parser = CommandParser(prog="studies.routing", description="Compares every router on Fashion-MNIST: docs/study.md.")
    parser.add_argument(
        "command", choices=["run", "left", "report", "timing", "experts", "classifier", "one", "larger"]
    )
    parser.add_argument("--work", type=Path, default=Path("runs/routing"), help="everything that is not committed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results are written and read")
    parser.add_argument("--jobs", type=int, default=2, help="run: how many runs at a time, each on a core")
    parser.add_argument("--system", choices=SYSTEMS, help="one: the run of this system")
    parser.add_argument("--seed", type=int, help="one, experts: of this seed")
    parser.add_argument("--lr", type=float, help="one, experts: with this learning rate")
    parser.add_argument("--minutes", type=float, default=30, help="larger: after which no run trains on; default: 30")
    parser.add_argument("--page", type=Path, default=PAGE, help="report: its tables are written, its plots beside it")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    set_up_logging(None, rank=0)
    place = driver.Workplace(arguments.work.resolve())
    place.folder.mkdir(parents=True, exist_ok=True)
    if arguments.command == "run":
        driver.drive(place, arguments.results, arguments.jobs)
    elif arguments.command == "one":
        driver.make_one(Run(arguments.system, arguments.seed, arguments.lr), place, arguments.results)
    elif arguments.command == "report":
        _report(arguments.results, arguments.page)
    elif arguments.command == "left":
        for run in driver.to_do(arguments.results):
            logger.info(run.name)
    elif arguments.command == "timing":
        write_result(arguments.results / "timing.json", timing.time_steps(place))
    elif arguments.command == "experts":
        _draw_experts(place, Run("global_pool", arguments.seed or 0, arguments.lr), arguments.page)
    elif arguments.command == "larger":
        larger.train_and_sample(
            driver.Workplace(place.folder / "larger"), arguments.results / "larger", arguments.minutes
        )
    elif arguments.command == "classifier":
        _train_classifier(place, arguments.results)


def _report(folder: Path, page: Path) -> None:
    """Write the tables into the page and draw the plots that there are results for."""
    results, folder = report.Results(folder), page.with_suffix("")
    for name in plots.draw_all(results, folder):
        logger.info("%s.png: not enough results yet", name)
    page.write_text(report.with_tables(page.read_text(), results, folder))
    for purpose, names in results.missing().items():
        logger.info("missing for %s: %d", purpose, len(names))


def _draw_experts(place: driver.Workplace, run: Run, page: Path) -> None:
    images, labels = read_images(place.shards("test"))
    picture.draw_experts(place.run_dir(run), images, labels, MIDDLE_LAYER, page.with_suffix("") / "experts.png")


def _train_classifier(place: driver.Workplace, results: Path) -> None:
    place.pack()
    images, labels = read_images(place.shards("train"))
    model = classifier.train_classifier(images, labels)
    classifier.save_classifier(model)
    reference, _ = classifier.look(model, images)
    tested = classifier.describe(model, *read_images(place.shards("test")), reference)
    write_result(results / "classifier.json", tested)


if __name__ == "__main__":
    run_command(main)
