// Lets a reader sort tables, hide curves, and read off points.
"use strict";

const NUMBER = /^(< )?-?\d+(\.\d+)?(e[-+]?\d+)?([ †]|$)/i;

function sortable(table) {
  const heads = []; // for each column, the lowest head that spans it alone
  for (const row of table.tHead.rows) {
    let column = 0;
    for (const th of row.cells) {
      if (th.colSpan === 1 && th.textContent.trim()) heads[column] = th;
      column += th.colSpan;
    }
  }
  const body = table.tBodies[0];
  heads.forEach((th, column) => {
    if (!body.rows.length) return;
    const texts = () => [...body.rows].map(row => row.cells[column].textContent.trim());
    const isNumber = texts().every(text => text === "–" || NUMBER.test(text));
    const button = document.createElement("button");
    button.append(...th.childNodes);
    button.dataset.label = body.rows[0].cells[column].dataset.label; // the full head, as a narrow page shows it
    button.setAttribute("aria-label", `Sort by ${button.dataset.label}`);
    th.append(button);
    button.addEventListener("click", () => {
      const before = th.getAttribute("aria-sort");
      const descending = before ? before === "ascending" : isNumber;
      for (const each of heads) each?.removeAttribute("aria-sort");
      th.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const compare = (a, b) => isNumber ? value(a) - value(b) : a.localeCompare(b, "en", { numeric: true });
      const rows = [...body.rows].map(row => [row.cells[column].textContent.trim(), row]);
      rows.sort(([a], [b]) =>
        a === "–" || b === "–" ? (a === "–") - (b === "–") : descending ? compare(b, a) : compare(a, b));
      body.append(...rows.map(([, row]) => row));
    });
  });
}

function value(text) {
  return parseFloat(text.replace("< ", ""));
}

function readable(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector(".chart");
  const curves = [...svg.querySelectorAll(".curve")].map((group, number) => ({
    group, data: data.curves[number], points: [...group.querySelector("polyline").points],
  }));
  const shown = () => curves.filter(curve => !curve.group.classList.contains("hidden"));

  figure.querySelectorAll(".legend li").forEach((item, number) => {
    const button = document.createElement("button");
    button.append(...item.childNodes);
    button.setAttribute("aria-pressed", "true");
    item.append(button);
    button.addEventListener("click", () => {
      const hidden = curves[number].group.classList.toggle("hidden");
      button.setAttribute("aria-pressed", String(!hidden));
      if (at?.curve === curves[number]) leave();
    });
  });

  const reading = document.createElement("p");
  reading.className = "reading";
  reading.setAttribute("aria-live", "polite");
  const hint = data.axes ? "Point at a line to read it off." : "Point at a curve to read it off; click its name to hide it.";
  figure.prepend(reading);
  const cursor = document.createElementNS(svg.namespaceURI, "circle");
  cursor.setAttribute("r", "4");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);
  let at = null; // the curve and the number of its point that a reader reads off

  function leave() {
    at?.curve.group.classList.remove("on");
    at = null;
    cursor.style.display = "none";
    reading.textContent = hint;
  }

  function read(curve, number) {
    at?.curve.group.classList.remove("on");
    at = { curve, number };
    curve.group.classList.add("on");
    const { x, y } = curve.points[number];
    cursor.style.display = "";
    cursor.setAttribute("cx", x);
    cursor.setAttribute("cy", y);
    const { name, x: xs, y: ys, deviation } = curve.data;
    reading.textContent = data.axes
      ? `${name}: ${data.axes.map((axis, k) => `${axis} ${ys[k]}`).join(", ")}`
      : `${name}, ${data.x} ${xs[number].toLocaleString("en")}: ${ys[number].toFixed(4)}` +
        (deviation?.[number] ? ` ± ${deviation[number].toFixed(4)}` : "");
  }

  function point(event) {
    const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let nearest = null, least = Infinity;
    for (const curve of shown()) {
      curve.points.forEach((each, number) => {
        const distance = Math.hypot(each.x - x, each.y - y);
        if (distance < least) [nearest, least] = [[curve, number], distance];
      });
    }
    if (nearest) read(...nearest);
  }

  svg.tabIndex = 0;
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", event => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Escape") leave();
    if (!(event.key in steps) || !shown().length) return;
    event.preventDefault();
    const [down, along] = steps[event.key], those = shown();
    const place = at ? those.indexOf(at.curve) + down : 0;
    const curve = those[(place + those.length) % those.length];
    const number = (at ? at.number : curve.points.length - 1) + along;
    read(curve, Math.max(0, Math.min(curve.points.length - 1, number)));
  });
  leave();
}

document.querySelectorAll("table").forEach(sortable);
document.querySelectorAll("figure:has(script)").forEach(readable);
