// What was found, as the page needs it: ranked, filtered, placed in z, written as CSV. Pure functions.
// A motor has rank, z, y, x, height, width, score and n_slices, in voxels; a voxel's index is its centre.

const NEAR_ANGSTROM = 60;
const RADIUS_ANGSTROM = 225; // a motor is about 450 angstrom wide

/** The motors of a tomogram's answer, or the detections of a slice's, ranked from 1, best first. */
export function ranked(answer) {
  const found = answer.motors ?? answer.detections.map((detection) => ({ z: 0, n_slices: 1, ...detection }));
  return [...found].sort((a, b) => b.score - a.score).map((motor, index) => ({ rank: index + 1, ...motor }));
}

export function atLeast(motors, threshold) {
  return motors.filter((motor) => motor.score >= threshold);
}

/** How a motor shows on slice `z`: "near", "far" (its flank) or null (it is not there). */
export function depthOf(motor, z, spacing) {
  const distance = Math.abs(motor.z - z);
  const near = Math.max(motor.n_slices / 2, spacing ? NEAR_ANGSTROM / spacing : 0);
  const far = Math.max(2 * near, spacing ? RADIUS_ANGSTROM / spacing : 0);
  if (distance <= near) return "near";
  return distance <= far ? "far" : null;
}

/** "y 210.5, x 87.0", with z in front for a tomogram. */
export function placeOf(motor, hasDepth) {
  return `${hasDepth ? `z ${motor.z.toFixed(1)}, ` : ""}y ${motor.y.toFixed(1)}, x ${motor.x.toFixed(1)}`;
}

/** The detections of the slice `name`; places in angstrom are empty where `spacing` is null. */
export function sliceCsv(name, motors, spacing) {
  const columns = ["y", "x", "height", "width", "score"];
  const lengths = (motor) => (spacing ? [motor.y * spacing, motor.x * spacing] : ["", ""]);
  const rows = motors.map((motor) => [quoted(name), ...columns.map((column) => motor[column]), ...lengths(motor)]);
  return [["image", ...columns, "y_angstrom", "x_angstrom"], ...rows].map((row) => `${row.join(",")}\n`).join("");
}

function quoted(text) {
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
