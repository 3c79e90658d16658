"""What the demo's page adds to the style sheet of `lidit inspect`."""

STYLE = """
.flow { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 20px; }
.step { position: relative; border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.step:not(:last-child)::after {
  content: "\\2192"; position: absolute; right: -17px; top: 50%; margin-top: -12px; color: var(--soft);
}
.step h3 { color: var(--blue); }
.step p { color: var(--soft); font-size: 12.5px; line-height: 1.35; min-height: 34px; }
.step ul { list-style: none; margin: 0 0 6px; padding: 0; font-size: 13px; font-variant-numeric: tabular-nums; }
.step b { font-variant-numeric: tabular-nums; }
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 16px; }
.row img, .drawn img { width: 100%; display: block; border-radius: 6px; image-rendering: pixelated; }
.row img { height: 150px; object-fit: contain; background: var(--back); }
.rows .caption { max-height: none; }
.task { margin: 16px 0 8px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 12px; }
.drawn { position: relative; margin: 0; }
.drawn img { border: 1px solid var(--line); }
.drawn b {
  position: absolute; top: 5px; right: 5px; width: 20px; height: 20px; border-radius: 50%; color: #fff;
  font-size: 13px; line-height: 20px; text-align: center;
}
.right { background: #1f8a4c; }
.wrong { background: #c4392f; }
.drawn figcaption { text-align: left; color: var(--ink); font-size: 12px; line-height: 1.3; }
.drawn i { display: block; color: var(--soft); font-size: 11px; }
.chart.wide svg, .chart svg { max-width: 860px; width: 100%; height: auto; }
.line { fill: none; stroke-width: 1.6; }
.s0 { stroke: var(--line); fill: none; } .s1 { stroke: var(--blue); } .s2 { stroke: #c98a1b; } .s3 { stroke: #1f8a4c; }
text.s1, text.s2, text.s3, text.s0 { stroke: none; }
text.s0 { fill: var(--soft); } text.s1 { fill: var(--blue); } text.s2 { fill: #c98a1b; } text.s3 { fill: #1f8a4c; }
.whisker { stroke: var(--ink); stroke-width: 1.4; }
pre { overflow-x: auto; background: var(--back); padding: 12px 14px; border-radius: 8px; margin: 0; }
"""
