(function () {
  var root = document.documentElement, button = document.getElementById("theme");
  var system = window.matchMedia("(prefers-color-scheme: dark)");
  function dark() { return (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark"; }
  function label() { button.textContent = dark() ? "Light theme" : "Dark theme"; }
  try { var kept = localStorage.getItem("flatcal-theme"); if (kept) root.dataset.theme = kept; } catch (e) {}
  button.hidden = false;
  button.addEventListener("click", function () {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("flatcal-theme", root.dataset.theme); } catch (e) {}
    label();
  });
  system.addEventListener("change", label);
  label();

  // Sortable tables: a button in every header cell; cells sort by data-value, else by their text.
  function value(row, column) {
    var cell = row.cells[column], given = cell.dataset.value;
    if (given === undefined) return cell.textContent.trim();
    return given === "" ? null : Number(given);
  }
  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), undefined, { numeric: true });
  }
  function sort(table, column) {
    var heads = table.tHead.rows[0].cells, head = heads[column], body = table.tBodies[0];
    var first = head.dataset.first || "ascending", other = first === "ascending" ? "descending" : "ascending";
    var order = head.getAttribute("aria-sort") === first ? other : first;
    var rows = Array.from(body.rows).map(function (row) { return [value(row, column), row]; });
    rows.sort(function (a, b) {  // what has no value, or says too little, stays last in either order
      var late = a[1].hasAttribute("data-last") - b[1].hasAttribute("data-last");
      if (late) return late;
      if (a[0] === null || b[0] === null) return (a[0] === null) - (b[0] === null);
      return order === "ascending" ? compare(a[0], b[0]) : compare(b[0], a[0]);
    });
    Array.from(heads).forEach(function (h) { h.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", order);
    rows.forEach(function (pair) { body.appendChild(pair[1]); });
  }
  document.querySelectorAll("table.sortable").forEach(function (table) {
    Array.from(table.tHead.rows[0].cells).forEach(function (head, column) {
      var press = document.createElement("button");
      press.type = "button";
      press.className = "sort";
      while (head.firstChild) press.appendChild(head.firstChild);
      head.appendChild(press);
      press.addEventListener("click", function () { sort(table, column); });
    });
  });

  function scrollable() {
    document.querySelectorAll(".scroll").forEach(function (box) {
      var wide = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
      if (wide) box.tabIndex = 0; else box.removeAttribute("tabindex");
    });
  }
  scrollable();
  window.addEventListener("resize", scrollable);
  document.querySelectorAll("details").forEach(function (d) { d.addEventListener("toggle", scrollable); });
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (d) { d.open = true; });
  });
})();
