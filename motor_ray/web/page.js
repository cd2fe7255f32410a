// The page's elements, and how words and numbers are put into them. Knows no requests.

import { Problem } from "./api.js";
import { FileError } from "./mrc.js";

export const at = (id) => document.getElementById(id);

/** The state of the work, in two parts: `status` is read out, so it changes seldom; `detail` may change often. */
export function say(status, detail = "") {
  if (at("status").textContent !== status) at("status").textContent = status;
  at("detail").textContent = detail;
}

/** `share` of the work is done, 0 to 1; null where it is not known. */
export function progress({ status, detail, share }) {
  const tenths = share === null ? "" : `: ${Math.floor(share * 10) * 10} %`;
  say(status + tenths, detail);
  if (share === null) at("progress").removeAttribute("value");
  else at("progress").value = share;
}

export function fail(error) {
  const parts = [["strong", titleOf(error)], ["p", error instanceof Problem ? error.detail : error.message]];
  if (error.retryAfter) parts.push(["p", `Try again in ${error.retryAfter} s.`]);
  if (error.requestId) parts.push(["p", `Request ${error.requestId}`]);
  at("alert").replaceChildren(...parts.filter(([, text]) => text).map(([tag, text]) => made(tag, text)));
  at("alert").scrollIntoView({ block: "nearest" }); // on a small screen it may be far from what was pressed
}

function titleOf(error) {
  if (error instanceof Problem) return error.title;
  // A DOMException is the browser's word on a file that changed or went away after it was chosen.
  return error instanceof FileError || error instanceof DOMException ? "This file cannot be shown" : "The page made a mistake";
}

export function clearError() {
  at("alert").replaceChildren();
}

export function showNotes(notes) {
  at("notes").replaceChildren(...notes.filter(Boolean).map((note) => made("li", note)));
}

export function showZ(z, depth) {
  Object.assign(at("z"), { max: depth - 1, value: z });
  at("z").setAttribute("aria-valuetext", `${z} of 0 to ${depth - 1}`);
  at("z-value").textContent = `${z} / ${depth - 1}`;
  at("z-row").hidden = at("hint").hidden = depth < 2;
}

export function showContrast({ low, high, least, most }) {
  for (const [id, value] of [["low", low], ["high", high]]) {
    Object.assign(at(id), { min: least, max: most, value });
    at(`${id}-value`).textContent = Number(value.toPrecision(4));
  }
}

/** While there is nothing to see, or not yet. */
export function noContrast(readable) {
  for (const id of ["low", "high", "auto"]) at(id).disabled = !readable;
  at("low-value").textContent = at("high-value").textContent = "";
}

/** Where the sliders stand, as `[low, high]`; the one that was moved pushes the other, so that black stays below white. */
export function contrastAfter(moved) {
  const [low, high] = [Number(at("low").value), Number(at("high").value)];
  return moved === "low" ? [low, Math.max(low, high)] : [Math.min(low, high), high];
}

/** The endpoint's model: the choice, the footer, and the threshold that was found best for it. */
export function showModel(model) {
  at("model").replaceChildren(...model.models.map((name) => new Option(name, name, false, name === model.name)));
  at("model-field").hidden = model.models.length < 2;
  at("threshold").value = model.presence_threshold;
  at("version").textContent = `motor_ray ${model.motor_ray}`;
  Object.assign(at("model-name"), { textContent: `model ${model.name} · ${model.sha256.slice(0, 12)}`, title: `SHA-256 ${model.sha256}` });
}

/** Voxel spacing in angstrom as it stands in the field; null where it is empty. */
export function spacingGiven() {
  return Number(at("spacing").value) || null;
}

/** A spacing from a file or an answer belongs to that file and goes with it; one that was typed in stays. */
export function prefillSpacing(spacing) {
  const field = at("spacing");
  if (spacing === null && field.dataset.prefilled === undefined) return;
  field.value = spacing ?? "";
  field.dataset.prefilled = "";
}

export function showReadout(voxel, hasDepth, z) {
  const place = voxel && `${hasDepth ? `z ${z}  ` : ""}y ${voxel.y}  x ${voxel.x}`;
  const value = voxel?.value === undefined ? "" : `  value ${Number(voxel.value.toPrecision(5))}`;
  at("readout").textContent = voxel ? place + value : "";
}

/** Hand `blob` to the browser as the file `name`. */
export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // by then the browser has it
}

function made(tag, text) {
  return Object.assign(document.createElement(tag), { textContent: text });
}
