"use strict";
(() => {
  const { charts } = JSON.parse(document.getElementById("figures").textContent);
  const box = document.body.appendChild(Object.assign(document.createElement("div"), { id: "reading" }));
  const mode = () => document.querySelector("input[name=x]:checked")?.value ?? "tokens";
  const place = { steps: (p) => p[0], tokens: (p) => p[1], time: (p) => p[2], flops: (p, s) => (p[1] === null || s.flops === null ? null : p[1] * s.flops) };
  const nearest = (series, at, x) => {
    let best = null;
    for (const point of series.points) {
      const own = place[at](point, series);
      if (own !== null && (best === null || Math.abs(own - x) < Math.abs(best.x - x))) best = { x: own, point };
    }
    return best;
  };
  for (const chart of charts) {
    const svg = document.querySelector(`#${chart.id} svg`);
    const hair = svg.querySelector(".hair");
    const hide = () => { box.style.display = "none"; hair.style.visibility = "hidden"; };
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", (event) => {
      const at = mode(), span = chart.x[at];
      if (!span) return hide();
      const [left, width] = chart.plot, frame = svg.getBoundingClientRect();
      const share = (((event.clientX - frame.left) / frame.width) * svg.viewBox.baseVal.width - left) / width;
      if (share < 0 || share > 1) return hide();
      const x = span[0] + share * (span[1] - span[0]);
      const found = chart.series.map((series) => [series, nearest(series, at, x)]).filter(([, best]) => best);
      if (!found.length) return hide();
      found.sort(([, a], [, b]) => Math.abs(a.x - x) - Math.abs(b.x - x));
      const px = left + (width * (found[0][1].x - span[0])) / (span[1] - span[0]);
      hair.setAttribute("x1", px);
      hair.setAttribute("x2", px);
      hair.style.visibility = "visible";
      const row = (name, value) => {
        const line = document.createElement("div");
        line.append(Object.assign(document.createElement("span"), { textContent: name }), Object.assign(document.createElement("span"), { textContent: value }));
        return line;
      };
      const rows = chart.series.map((series) => [series, found.find(([own]) => own === series)?.[1]]).filter(([, best]) => best);
      box.replaceChildren(...rows.map(([series, best]) => row(`${series.name}, step ${best.point[0]}`, Number(best.point[3].toPrecision(6)))));
      box.style.display = "block";
      const wide = box.offsetWidth + 16;
      box.style.left = `${Math.max(4, event.clientX + wide > innerWidth ? event.clientX - wide : event.clientX + 14)}px`;
      box.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 4))}px`;
    });
  }
})();
