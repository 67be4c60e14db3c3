"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => {
    const key = row.cells[i].dataset.v;
    if (key === undefined) return row.cells[i].textContent;
    return key === "" ? NaN : Number(key);
  };
  heads.forEach((head, i) => {
    const button = head.querySelector("button.sort");
    if (!button) return;
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1;
      const rows = [...body.rows];
      rows.sort((a, b) => {
        const x = value(a, i), y = value(b, i);
        if (typeof x === "string") return sign * x.localeCompare(y, undefined, { numeric: true });
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return sign * (x - y);
      });
      body.append(...rows);
    });
  });
}
const table = document.getElementById("latents");
if (table) {
  const search = document.getElementById("search"), coder = document.getElementById("coder");
  const count = document.getElementById("count");
  const rows = [...table.tBodies[0].rows];
  const apply = () => {
    const wanted = search.value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = (!coder.value || row.dataset.coder === coder.value) && row.textContent.toLowerCase().includes(wanted);
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = shown.toLocaleString("en") + " of " + rows.length.toLocaleString("en");
  };
  search.addEventListener("input", apply);
  coder.addEventListener("change", apply);
  apply();
}
