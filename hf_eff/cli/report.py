"""``hf-eff report``: print the report of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_eff.cli import COMMANDS
from hf_eff.cli.flags import SentenceErrors
from hf_eff.errors import DataError


def run(argv: Sequence[str]) -> int:
    """Print ``report.md`` of a run's folder and where its figures lie, or ``report.json``.

    Raises:
        DataError: The folder holds no report.
    """
    parser = SentenceErrors(prog="hf-eff report", description=COMMANDS["report"], allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, help="output_dir of the run")
    parser.add_argument("--json", action="store_true", help="print report.json")
    options = parser.parse_args(list(argv))
    path = options.run_dir / ("report.json" if options.json else "report.md")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{str(path)!r} cannot be read ({error.strerror}); give the output_dir of a run that has ended."
        ) from None
    print(text.rstrip("\n"))
    if not options.json:
        _print_figures(options.run_dir)
    return 0


def _print_figures(folder: Path) -> None:
    """Name the figures of the run; the governor's is drawn now if its log has none yet."""
    from hf_eff.publish.bundle import figures
    from hf_eff.report.governor_figure import FIGURE, figure_of

    if not (folder / FIGURE).is_file():
        figure_of(folder)
    for name in figures(folder):
        print(f"Figure: {folder / name}")
