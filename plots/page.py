"""The frame of the report: its style, and the few lines that sort a table by a click."""

from __future__ import annotations

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; --line: #e2e2e2; --soft: #666; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 1100px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 18px; margin: 40px 0 10px; }
header p { color: var(--soft); margin: 2px 0; font-size: 13px; }
section p { color: var(--soft); margin: 14px 0 6px; font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px 4px 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.t { white-space: nowrap; }
td.long { max-width: 60ch; min-width: 30ch; overflow-wrap: anywhere; white-space: normal; }
th button { font: inherit; font-weight: 600; border: 0; background: none; padding: 0; cursor: pointer; color: inherit;
            white-space: nowrap; }
th button:hover, th button:focus-visible { text-decoration: underline; }
th[aria-sort] button::after { content: " \\25BE"; }
th[aria-sort="ascending"] button::after { content: " \\25B4"; }
.picture svg { display: block; max-width: 100%; min-width: 640px; height: auto; }
@media print { body { max-width: none; } .scroll { overflow: visible; } section { break-inside: avoid-page; } }
</style>
</head>
<body>
<header><h1>$title</h1>
$lead</header>
$body
<script>
document.querySelectorAll("th button").forEach(function (button) {
  button.addEventListener("click", function () {
    var head = button.parentElement, table = head.closest("table"), column = head.cellIndex;
    var up = head.getAttribute("aria-sort") === "descending";
    var numeric = head.classList.contains("n");
    var rows = Array.from(table.tBodies[0].rows);
    rows.sort(function (one, two) {
      var a = one.cells[column], b = two.cells[column], order;
      if (numeric) {
        order = (parseFloat(a.dataset.v) || -Infinity) - (parseFloat(b.dataset.v) || -Infinity) || 0;
      } else {
        order = a.textContent.localeCompare(b.textContent);
      }
      return up ? order : -order;
    });
    rows.forEach(function (row) { table.tBodies[0].appendChild(row); });
    table.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
  });
});
</script>
</body>
</html>
""")
