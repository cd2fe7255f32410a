// Drawings over the slice, in SVG, so that lines and letters stay sharp at any zoom. Units are pixels of the screen.

const NAMESPACE = "http://www.w3.org/2000/svg";
const SMALLEST_RADIUS = 7;
const LABEL_ROOM = 72; // the width of "12 · 0.98"

/** The SVG group of `motor`, at `scale` screen pixels a voxel on a sheet `sheetWidth` wide. */
export function markOf(motor, { scale, sheetWidth, depth, selected }) {
  const [x, y] = [(motor.x + 0.5) * scale, (motor.y + 0.5) * scale]; // an index is a voxel's centre
  const [rx, ry] = [motor.width, motor.height].map((edge) => Math.max((edge * scale) / 2, SMALLEST_RADIUS));
  const group = element("g", { class: `mark ${depth}${selected ? " selected" : ""}`, "data-rank": motor.rank });
  // Each line twice, dark below light: it shows on any grey.
  for (const layer of ["halo", "line"]) {
    group.append(element("ellipse", { class: layer, cx: x, cy: y, rx, ry }));
    if (selected) group.append(element("path", { class: layer, d: crosshair(x, y, rx, ry) }));
  }
  const onLeft = x + rx + LABEL_ROOM > sheetWidth;
  const label = element("text", { x: x + (onLeft ? -1 : 1) * (rx * 0.72 + 5), y: Math.max(y - ry * 0.72, 14) });
  if (onLeft) label.setAttribute("text-anchor", "end");
  label.textContent = `${motor.rank} · ${motor.score.toFixed(2)}`;
  group.append(label);
  return group;
}

/** A bar of a round length of at most a quarter of the sheet, bottom left. */
export function scaleBar({ scale, spacing, sheetWidth, sheetHeight }) {
  const most = (sheetWidth / 4 / scale) * spacing; // angstrom
  const power = 10 ** Math.floor(Math.log10(most));
  const length = [5, 2, 1].find((digit) => digit * power <= most) * power;
  const [x, y, width] = [14, sheetHeight - 14, (length / spacing) * scale];
  const group = element("g", { class: "scale-bar" });
  for (const layer of ["halo", "line"]) group.append(element("path", { class: layer, d: `M${x} ${y}h${width}` }));
  const label = element("text", { x, y: y - 9 });
  label.textContent = length >= 1000 ? `${length / 10} nm` : `${length} Å`;
  group.append(label);
  return group;
}

/** A tick for each motor along z, beside the slider: where in the stack to look. */
export function ticks(motors, depth, selectedRank) {
  return motors.map((motor) => {
    const at = depth > 1 ? `${(100 * motor.z) / (depth - 1)}%` : "50%";
    const selected = motor.rank === selectedRank;
    return element("line", { class: selected ? "tick selected" : "tick", x1: at, x2: at, y1: selected ? 0 : 3, y2: 10 });
  });
}

function crosshair(x, y, rx, ry) {
  const arm = 8;
  return `M${x - rx - arm} ${y}h${arm} M${x + rx} ${y}h${arm} M${x} ${y - ry - arm}v${arm} M${x} ${y + ry}v${arm}` +
    `M${x - 4} ${y}h8 M${x} ${y - 4}v8`;
}

function element(name, attributes) {
  const made = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
