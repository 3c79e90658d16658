"""The ingest job's summary: what it says of rows that were there before, that it did not take, or not as they came."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from lidit.runtime.result import filled
from pipelines.engine.summary import Summary

SHOWN_ENDINGS = 8  # of files that were passed over
COMPARED = "captions of {compared:,.0f} rows{of_sizes} and images of {compared_images:,.0f} were compared"
LINES = (
    "  unchanged  {already_there:,.0f} rows were there already",
    "  failed     {failed_before:,.0f} of these {tried}",
    f"  differ     {{differ:,.0f}} of these have another image or caption in the source now, such as {{such_as[differ]}}: "
    f"{COMPARED}{{advice}}",
    f"  differ     {{none_differ}} of these has another image or caption in the source now: {COMPARED}",
    "  not taken  {unnamed:,.0f} of them have ids from before these said where a source lies, and may be another source's of "
    "that name: --update leaves them",
    "  updated    {updated:,.0f} rows; `lidit inspect` says what was made of their old content",
    "  kept       {not_updated:,.0f} rows stay as they were, such as {such_as[not_updated]}",
    "  skipped    {shards_done_before:,.0f} shards were taken in whole before (--reread reads them)",
    "  unread     {unread:,.0f} shards ended the process that read them, or need more memory than there is, such as "
    "{such_as[unread]}: the next run tries them again",
    "  repeated   {repeated:,.0f} rows came more than once, image and caption alike",
    "  passed by  {passed_by}: not of this source, or not read here",
    "  not used   {texts_without_image:,.0f} texts name or stand beside no image that is there",
    "  not used   {texts_more:,.0f} lines of metadata name an image that has had one: the last one counts",
    "  not used   {metadata_without_text:,.0f} lines of metadata have no text",
    "  not used   {metadata_unreadable:,.0f} metadata files below are damaged or cannot be opened: captions there stay as they "
    "are",
    "  not used   {annotations_twice:,.0f} annotations are there twice, caption and all",
    "  not used   {images_without_text:,.0f} images of the set have no annotation, so no row",
    "  more       {more_images:,.0f} further images of samples were not taken: one is a sample's",
    "  no text    {no_caption:,.0f} rows came without a caption",
    "  left out   {filtered}",
    "  no caption {caption_null}",
    "  unknown    {unknown} and were not compared",
)


class IngestSummary(Summary):
    """Figures of one ingest."""

    def own_lines(self) -> Iterable[str]:
        """Rows that were there before and what differs in them; what was not read, not used, or filtered out."""
        counts, passed = self.counts, self.counts_of("left_out_")
        others = sum(count for _, count in passed[SHOWN_ENDINGS:])
        passed = [*passed[:SHOWN_ENDINGS], *([("others", others)] if others else [])]
        is_updating = "updated" in counts or "not_updated" in counts
        words = {
            **counts,
            "such_as": defaultdict(str, {kind: "; ".join(texts) for kind, texts in self.examples.items()}),
            "tried": "had an error, and were tried again"
            if is_updating
            else "have an error; --update tries them again",
            "none_differ": "none" if "compared_images" in counts and not counts["differ"] else "",
            "of_sizes": f", file sizes of {sizes:,.0f}" if (sizes := counts.get("compared_sizes")) else "",
            "advice": "" if is_updating else ". They stay as they are; --update takes what the source has now",
            "passed_by": _listed("{1:,.0f} {0}", passed),
            "filtered": _listed("{1:,.0f} by {0}", self.counts_of("filtered_")),
            "caption_null": _listed("{1:,.0f} by {0}", self.counts_of("caption_null_")),
            "unknown": _listed("{1:,.0f} images of the table have no {0}", self.counts_of("without_")),
        }
        return filled(LINES, words)


def _listed(form: str, counts: Iterable[tuple[str, float]]) -> str:
    return ", ".join(form.format(*count) for count in counts)
