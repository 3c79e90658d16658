"""The style sheet of the page that `lidit inspect` writes; light or dark as the reader's system is."""

STYLE = """
:root {
  --ink: #16202c; --soft: #5b6b7d; --line: #e3e8ee; --paper: #fff; --back: #f5f7fa;
  --blue: #2f6fde; --pale: #e8f0fe; --red: #c4392f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e7ecf2; --soft: #9aa8b7; --line: #2a3440; --paper: #171d25; --back: #0f141a;
    --blue: #6da2ff; --pale: #1c2a44; --red: #ff8077;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 48px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.02em; }
h2 { font-size: 18px; margin: 0 0 14px; letter-spacing: -.01em; }
h3 { font-size: 14px; margin: 0 0 2px; overflow-wrap: anywhere; }
p { margin: 0 0 6px; }
code, pre { font: 12.5px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
summary { cursor: pointer; color: var(--soft); font-size: 13px; }

header { margin-bottom: 28px; }
.kicker {
  color: var(--blue); font-size: 12px; font-weight: 600; letter-spacing: .08em; text-transform: uppercase; margin: 0;
}
.path, .where, .hint, footer { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; margin-top: 18px; }
.tile, section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 22px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
section { padding: 20px 22px; margin-bottom: 20px; }

.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 16px; }
article, .card { border: 1px solid var(--line); border-radius: 10px; padding: 12px; min-width: 0; }
.pictures { display: flex; gap: 8px; align-items: flex-start; margin-bottom: 8px; }
figure { margin: 0; flex: 1 1 0; min-width: 0; }
figure img {
  display: block; width: 100%; height: auto; max-height: 240px; object-fit: contain;
  background: var(--back); border-radius: 6px;
}
figcaption { color: var(--soft); font-size: 11.5px; margin-top: 3px; text-align: center; }
.none { flex: 1; padding: 28px 0; text-align: center; color: var(--soft); background: var(--back); border-radius: 6px; }
.caption { margin: 8px 0 0; font-size: 13.5px; overflow-wrap: anywhere; max-height: 130px; overflow: auto; }
.caption span:first-child, .notes span { display: block; color: var(--soft); font-size: 11px; letter-spacing: .02em; }
.caption .null { display: inline; font-style: italic; color: var(--soft); }
q { quotes: none; }
.notes {
  display: flex; flex-wrap: wrap; gap: 6px 14px; list-style: none; margin: 8px 0 0; padding: 0; font-size: 12.5px;
  overflow-wrap: anywhere;
}

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(350px, 1fr)); gap: 22px 28px; }
.chart svg { width: 100%; height: auto; }
.bar { fill: var(--blue); }
.bar:hover { opacity: .7; }
.axis { stroke: var(--line); }
.median { stroke: var(--red); stroke-dasharray: 3 2; }
.frame { fill: none; stroke: var(--soft); }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg .label { fill: var(--ink); }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { padding: 6px 14px 6px 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: 12px; white-space: nowrap; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.size { width: 120px; min-width: 80px; vertical-align: middle; }
td.stopped { color: var(--red); }
.size i, .progress i { display: block; height: 8px; border-radius: 4px; background: var(--blue); min-width: 1px; }

.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 16px; }
.card p code {
  background: var(--pale); border-radius: 4px; padding: 1px 5px; display: inline-block; margin: 0 2px 4px 0;
  overflow-wrap: anywhere;
}
.digest { color: var(--soft); font-weight: 400; }
.progress { background: var(--back); border-radius: 4px; margin: 8px 0 6px; }
.progress.part i { background: var(--red); }
details pre {
  white-space: pre-wrap; overflow-wrap: anywhere; background: var(--back); padding: 10px; border-radius: 6px;
  max-height: 320px; overflow: auto;
}
.reason { padding: 10px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
.reason:last-child { border: 0; }
.reason ul { margin: 4px 0 0; padding-left: 18px; color: var(--soft); font-size: 13px; }
.stage { background: var(--pale); color: var(--blue); border-radius: 4px; padding: 1px 6px; font-size: 12px; }
footer { margin-top: 8px; }
"""
