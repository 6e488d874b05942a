"""The part of a run's card that names what belongs to it on the Hub; replaced at every push."""

from __future__ import annotations

from pathlib import Path

from hf_eff.files import write_text
from hf_eff.hub import address
from hf_eff.recipe import FOLDER as RECIPES
from hf_eff.run_directory import CARD

START, END = "<!-- hf_eff links -->", "<!-- /hf_eff links -->"


def write_links(folder: Path, repo_id: str, selection_repo: str | None, collection: str | None) -> None:
    """Put links into the card of a run; without any, or without a card, nothing changes.

    Args:
        folder: ``output_dir`` of the run.
        repo_id: Repository it goes to.
        selection_repo: Dataset repository of the selection.
        collection: Slug of the collection.
    """
    card, lines = folder / CARD, []
    if selection_repo:
        lines.append(f"- Rows it was trained on: [{selection_repo}]({address(selection_repo, 'dataset')})")
    if collection:
        lines.append(f"- Collection: [{collection}]({address(f'collections/{collection}', 'model')})")
    if any((folder / RECIPES).glob("*.yaml")):
        lines.append(f"- Do it again: `hf-eff train --recipe {repo_id} --output_dir out`")
    if not lines or not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        before, after = text.rstrip() + "\n\n", "\n"
    block = "\n".join([START, "## On the Hub", "", *lines, END])
    write_text(card, f"{before}{block}{after}")
