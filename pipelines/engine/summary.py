"""Summary of a run: for a person on stderr, for a machine as JSON on stdout and in the run's folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from lidit.runtime.printable import one_line, printable

SHOWN_ENDINGS = 8  # of files that were passed over


@dataclass
class Summary:
    """Figures of one run. `ok` only if every fragment that has the columns read now has the columns written."""

    job: str
    store: str
    run: str = ""
    ok: bool = False
    dry_run: bool = False
    plan: list[str] = field(default_factory=list)  # of a dry run; of a stamp, what was recorded
    fragments: int = 0  # committed by this run
    fragments_waiting: int = 0  # that lack the column to read
    fragments_stale: int = 0  # done again, as a column that theirs were made from has changed
    rows: int = 0
    errors: int = 0
    error_examples: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)  # kind, such as a status -> a few texts
    bytes_written: int = 0
    seconds: float = 0.0  # the whole run
    work_seconds: float = 0.0  # first actor's begin to last actor's end, writing included
    commits: int = 0
    commit_seconds: float = 0.0
    orphans_removed: int = 0
    next: str = ""

    @property
    def rates(self) -> dict[str, float]:
        """rows/s, tokens/s, share of padding, bytes a row: those that there is anything to say of."""
        rates = {}
        if self.work_seconds:
            rates["rows_per_second"] = self.rows / self.work_seconds
            for what in ("tokens", "images"):
                if self.counts.get(what):
                    rates[f"{what}_per_second"] = self.counts[what] / self.work_seconds
        if self.counts.get("slots"):
            rates["padding_waste"] = 1 - self.counts.get("tokens", 0) / self.counts["slots"]
        if self.rows:
            rates["bytes_per_row"] = self.bytes_written / self.rows
        return rates

    def to_json(self) -> str:
        """One JSON object on one line, rates included."""
        return json.dumps({**asdict(self), **self.rates})

    def to_text(self) -> str:
        """A few lines for a person: what was done, how fast, where it is, what to run next."""
        if self.dry_run:
            return printable("\n".join([*self.plan, "dry run: nothing was changed"]))
        lines = [
            f"{self.job}: {'done' if self.ok else 'NOT DONE'}, {self.rows:,} rows in {self.fragments:,} fragments, "
            f"{self.seconds:,.1f} s ({self.work_seconds:,.1f} s of work, {self.commits} commits in {self.commit_seconds:.2f} s)"
        ]
        rates, counts = self.rates, self.counts
        if "rows_per_second" in rates and self.rows:
            speed = f"  speed      {rates['rows_per_second']:,.0f} rows/s"
            if "tokens_per_second" in rates:
                speed += f", {rates['tokens_per_second']:,.0f} tokens/s"
            if "images_per_second" in rates:
                speed += f", {rates['images_per_second']:,.1f} images/s (equal ones counted once)"
            if "padding_waste" in rates:
                speed += f", padding waste {rates['padding_waste']:.1%}"
            lines.append(speed)
        if counts.get("images") and "device_seconds" in counts:
            decode, device = (1e3 * counts[f"{what}_seconds"] / counts["images"] for what in ("decode", "device"))
            waited = counts["wait_seconds"] / max(counts["call_seconds"], 1e-9)
            lines.append(
                f"  an image   {decode:,.1f} ms to decode and resize (in threads beside), {device:,.1f} ms on the device; "
                f"{waited:.0%} of the time was waiting for decoding"
            )
        if self.rows:
            lines.append(f"  written    {self.bytes_written / 1e6:,.1f} MB, {rates['bytes_per_row']:,.0f} bytes a row")
        if counts.get("truncated"):
            lines.append(f"  truncated  {counts['truncated']:,.0f} prompts were longer than the limit and cut")
        if counts.get("already_there"):
            lines.append(f"  unchanged  {counts['already_there']:,.0f} rows were there already")
        lines += self._failed_lines()
        lines += self._compared_lines()
        lines += self._ingest_lines()
        lines += self._status_lines()
        if self.fragments_waiting:
            lines.append(f"  waiting    {self.fragments_waiting:,} fragments lack the column to read")
        if self.fragments_stale:
            lines.append(f"  again      {self.fragments_stale:,} fragments: what they were made from has changed since")
        if self.errors:
            lines.append(f"  errors     {self.errors:,} rows have nulls and a reason in `{self.job}_error`; such as")
            lines += [f"             {one_line(example['error'])}" for example in self.error_examples]
        lines += [f"  {line}" for line in self.plan]
        if self.orphans_removed:
            lines.append(f"  cleaned    {self.orphans_removed} unfinished files of killed runs")
        lines.append(f"  table      {self.store.rstrip('/')}/samples.lance")
        if self.next:
            lines.append(f"  next       {self.next}")
        return printable("\n".join(lines))

    def _failed_lines(self) -> list[str]:
        """How many rows of the table had an error before an ingest, and what becomes of them."""
        if not (failed := self.counts.get("failed_before")):
            return []
        tried = "updated" in self.counts or "not_updated" in self.counts
        return [
            f"  failed     {failed:,.0f} of these have an error; --update tries them again"
            if not tried
            else f"  failed     {failed:,.0f} of these had an error, and were tried again"
        ]

    def _compared_lines(self) -> list[str]:
        """What an ingest found of rows that are in the table already, and what became of them."""
        counts = self.counts
        if "compared_images" not in counts:  # a stamp has `compared` alone
            return []
        sizes = f", file sizes of {counts['compared_sizes']:,.0f}" if counts.get("compared_sizes") else ""
        looked = f"captions of {counts['compared']:,.0f} rows{sizes} and images of {counts['compared_images']:,.0f}"
        looked += " were compared"
        if not counts["differ"]:
            lines = [f"  differ     none of these has another image or caption in the source now: {looked}"]
        else:
            updating = "updated" in counts or "not_updated" in counts
            lines = [
                f"  differ     {counts['differ']:,.0f} of these have another image or caption in the source now, such as "
                f"{one_line(', '.join(self.examples.get('differ', [])))}: {looked}"
                f"{'' if updating else '. They stay as they are; --update takes what the source has now'}"
            ]
        if counts.get("unnamed"):
            lines.append(
                f"  not taken  {counts['unnamed']:,.0f} of them have ids from before these said where a source lies, and may "
                f"be another source's of that name: --update leaves them"
            )
        if counts.get("updated"):
            lines.append(
                f"  updated    {counts['updated']:,.0f} rows; `lidit inspect` says what was made of their old content"
            )
        if counts.get("not_updated"):
            said = one_line("; ".join(self.examples.get("not_updated", [])))
            lines.append(f"  kept       {counts['not_updated']:,.0f} rows stay as they were, such as {said}")
        return lines

    def _ingest_lines(self) -> list[str]:
        """What an ingest did not take as it came, by reason."""
        counts = self.counts
        lines = []
        if counts.get("shards_done_before"):
            lines.append(
                f"  skipped    {counts['shards_done_before']:,.0f} shards were taken in whole before (--reread reads them)"
            )
        if counts.get("unread"):
            lines.append(
                f"  unread     {counts['unread']:,.0f} shards ended the process that read them, or need more memory than "
                f"there is, such as {one_line(', '.join(self.examples.get('unread', [])))}: the next run tries them again"
            )
        if counts.get("repeated"):
            lines.append(f"  repeated   {counts['repeated']:,.0f} rows came more than once, image and caption alike")
        passed = {name.removeprefix("left_out_"): n for name, n in counts.items() if name.startswith("left_out_")}
        if passed:
            most = sorted(passed.items(), key=lambda item: (-item[1], item[0]))
            words = [f"{count:,.0f} {what}" for what, count in most[:SHOWN_ENDINGS]]
            words += [f"{sum(count for _, count in most[SHOWN_ENDINGS:]):,.0f} others"] * (len(most) > SHOWN_ENDINGS)
            lines.append(f"  passed by  {one_line(', '.join(words))}: not of this source, or not read here")
        for name, what in (
            ("texts_without_image", "texts name or stand beside no image that is there"),
            ("texts_more", "lines of metadata name an image that has had one: the last one counts"),
            ("metadata_without_text", "lines of metadata have no text"),
            (
                "metadata_unreadable",
                "metadata files below are damaged or cannot be opened: captions there stay as they are",
            ),
            ("annotations_twice", "annotations are there twice, caption and all"),
            ("images_without_text", "images of the set have no annotation, so no row"),
        ):
            if counts.get(name):
                lines.append(f"  not used   {counts[name]:,.0f} {what}")
        if counts.get("more_images"):
            lines.append(
                f"  more       {counts['more_images']:,.0f} further images of samples were not taken: one is a sample's"
            )
        if counts.get("no_caption"):
            lines.append(f"  no text    {counts['no_caption']:,.0f} rows came without a caption")
        for prefix, what in (("filtered_", "  left out   "), ("caption_null_", "  no caption ")):
            found = {name.removeprefix(prefix): count for name, count in counts.items() if name.startswith(prefix)}
            if found:
                lines.append(what + ", ".join(f"{count:,.0f} by {name}" for name, count in sorted(found.items())))
        for name, count in counts.items():
            if name.startswith("without_"):
                lines.append(f"  unknown    {count:,.0f} images of the table have no {name[8:]} and were not compared")
        return lines

    def _status_lines(self) -> list[str]:
        """How many rows have which status, the commonest first, with an example of each."""
        found = {name[7:]: count for name, count in self.counts.items() if name.startswith("status_")}
        lines = []
        for status, count in sorted(found.items(), key=lambda item: -item[1]):
            said = self.examples.get(status, [])
            lines.append(
                f"  {status:<10} {count:,.0f} rows" + (f', such as "{one_line(said[0])[:160]}"' if said else "")
            )
        if self.counts.get("blank_checked"):
            lines.append(
                f"  looked     {self.counts['blank_checked']:,.0f} images were also shown blank: "
                f"{self.counts.get('blank_same', 0):,.0f} captions stayed the same"
            )
        return lines
