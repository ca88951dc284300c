"use strict";

/* Tables that are sorted by a click on a column and filtered by a search word. */
function makeSortable(table) {
  const body = table.tBodies[0];
  for (const header of table.tHead.rows[0].cells) {
    if (!header.textContent.trim()) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    header.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => sortBy(table, body, header));
  }
}

function sortBy(table, body, header) {
  const column = header.cellIndex, numeric = header.classList.contains("number");
  const down = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const value = (row) => {
    const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent.trim();
    return numeric ? (text === "" ? NaN : Number(text.replaceAll(",", ""))) : text;
  };
  const compare = (a, b) => {
    const [x, y] = [a.value, b.value];
    if (!numeric) return down * x.localeCompare(y);
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // empty cells come last
    return down * (x - y);
  };
  const rows = [...body.rows].map((row) => ({ row, value: value(row) })).sort(compare);
  body.append(...rows.map((entry) => entry.row));
  for (const other of table.tHead.rows[0].cells) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
}

function makeSearchable(tools) {
  const rows = [...document.getElementById(tools.dataset.for).tBodies[0].rows];
  if (rows.length <= 10) return;
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const input = document.createElement("input");
  const shown = document.createElement("span");
  input.type = "search";
  input.placeholder = "Find a class";
  input.setAttribute("aria-label", "Find a class");
  shown.className = "quiet";
  shown.setAttribute("role", "status");
  const filter = () => {
    const query = input.value.trim().toLowerCase();
    let count = 0;
    rows.forEach((row, index) => {
      row.hidden = !texts[index].includes(query);
      count += row.hidden ? 0 : 1;
    });
    shown.textContent = query ? `${count.toLocaleString("en")} of ${rows.length.toLocaleString("en")}` : `${rows.length.toLocaleString("en")} rows; click a column name to sort`;
  };
  input.addEventListener("input", filter);
  tools.append(input, shown);
  filter();
}

/* Confusion map: a dot per pair of classes, at least 2.5 pixels wide. A click zooms in, the next one zooms out. */
function drawMap(figure, data) {
  const size = data.names.length, pixels = 1024, zoomed = Math.min(size, 60);
  const canvas = document.createElement("canvas"), caption = figure.querySelector("figcaption");
  const cells = new Map();
  for (let at = 0; at < data.cells.length; at += 3) cells.set(data.cells[at] * size + data.cells[at + 1], data.cells[at + 2]);
  let view = { row: 0, column: 0, span: size };
  canvas.width = canvas.height = pixels;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Confusion map of ${size} classes; the list next to it has the most frequent confusions.`);
  figure.prepend(canvas);

  const hint = () => `Hover over a dot to see its numbers${zoomed === size ? "" : view.span === size ? "; click to zoom in" : "; click to zoom out"}.`;
  const draw = () => {
    const context = canvas.getContext("2d"), colors = getComputedStyle(document.documentElement);
    const tint = { true: colors.getPropertyValue("--right").trim(), false: colors.getPropertyValue("--wrong").trim() };
    const cell = pixels / view.span, dot = Math.max(cell * 0.92, 2.5);
    context.clearRect(0, 0, pixels, pixels);
    for (const [key, count] of cells) {
      const row = Math.floor(key / size), column = key % size, fraction = count / data.images[row];
      const strength = row === column ? 0.15 + 0.6 * fraction : Math.min(1, 0.3 + 1.4 * fraction);
      context.fillStyle = `rgb(${tint[row === column]} / ${strength})`;
      context.fillRect((column - view.column + 0.5) * cell - dot / 2, (row - view.row + 0.5) * cell - dot / 2, dot, dot);
    }
    caption.textContent = hint();
  };
  const place = (event) => {
    const box = canvas.getBoundingClientRect(), scale = (length, edge, side) => Math.floor(((length - edge) / side) * view.span);
    return { row: view.row + scale(event.clientY, box.top, box.height), column: view.column + scale(event.clientX, box.left, box.width) };
  };
  const nearest = (at) => {
    const reach = Math.ceil(view.span / 100);
    let best = null;
    for (let row = at.row - reach; row <= at.row + reach; row++) {
      for (let column = at.column - reach; column <= at.column + reach; column++) {
        if (row < 0 || column < 0 || row >= size || column >= size || !cells.has(row * size + column)) continue;
        const distance = (row - at.row) ** 2 + (column - at.column) ** 2;
        if (best === null || distance < best.distance) best = { row, column, distance };
      }
    }
    return best;
  };
  const describe = (event) => {
    const found = nearest(place(event));
    if (found === null) return void (caption.textContent = hint());
    const count = `${cells.get(found.row * size + found.column)} of ${data.images[found.row]}`;
    const outcome = found.row === found.column ? "correct" : `predicted as ${data.names[found.column]}`;
    caption.textContent = `${data.names[found.row]}: ${count} ${outcome}`;
  };
  const zoom = (event) => {
    const at = place(event), start = (middle) => Math.max(0, Math.min(size - zoomed, middle - Math.floor(zoomed / 2)));
    view = view.span === size ? { row: start(at.row), column: start(at.column), span: zoomed } : { row: 0, column: 0, span: size };
    draw();
  };
  draw();
  canvas.addEventListener("pointermove", describe);
  canvas.addEventListener("pointerleave", () => { caption.textContent = hint(); });
  canvas.addEventListener("click", zoom);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
document.querySelectorAll(".tools").forEach(makeSearchable);
const mapData = document.getElementById("map-data");
if (mapData) drawMap(document.getElementById("map"), JSON.parse(mapData.textContent));
