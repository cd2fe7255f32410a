// Puts the page together: what is open, what was found, and what each control does.

import { Api } from "./api.js";
import { find, refusal } from "./find.js";
import { keyDialog } from "./key.js";
import { fillList, summary } from "./list.js";
import { atLeast, sliceCsv } from "./motors.js";
import * as page from "./page.js";
import { openFile, remote } from "./sources.js";
import { View } from "./view.js";

const { at } = page;
const api = new Api(keyDialog(at("key-dialog")));
const view = new View(
  { stage: at("stage"), sheet: at("sheet"), canvas: at("canvas"), overlay: at("overlay"), ticks: at("ticks") },
  { z: (z) => page.showZ(z, view.source.depth), contrast: page.showContrast, read: (error) => error && page.fail(error) },
);

/** `run` is the search under way, `result` what the last one found, `id` the endpoint's name of its tomogram. */
const state = { source: null, model: null, run: null, result: null, id: null, selected: null, opening: 0 };

async function choose(files) {
  if (!files.length) return;
  const ticket = ++state.opening; // of two files chosen in a row the second counts, however long each takes to open
  try {
    const source = await openFile(files[0]);
    if (ticket === state.opening) await open(source);
  } catch (error) {
    if (ticket === state.opening) page.fail(error);
  }
}

async function open(source) {
  stop();
  state.opening++;
  Object.assign(state, { source, result: null, id: null, selected: null });
  page.prefillSpacing(source.spacing);
  page.clearError();
  page.say("");
  at("stage").classList.add("open");
  at("source-name").textContent = source.name;
  page.noContrast(source.read !== null);
  const drawn = view.open(source);
  render();
  // Where the spacing has to be stated first, sending the file would be in vain.
  const ready = source.kind !== "tomogram" || !source.note || page.spacingGiven();
  await Promise.all([drawn, ready ? search() : null]);
}

async function search() {
  const { source } = state;
  if (!source || !at("spacing").reportValidity()) return;
  stop();
  const run = { controller: new AbortController(), id: null };
  Object.assign(state, { run, result: null, id: null, selected: null });
  page.clearError();
  page.progress({ status: "Asking the endpoint", detail: "", share: null });
  render();
  try {
    const model = await loadModel();
    if (state.run !== run) return;
    const problem = refusal(source, model.limits);
    if (problem) throw problem;
    const query = { voxel_spacing_angstrom: page.spacingGiven(), model: at("model").value };
    const result = await find(api, source, query, run, (report) => state.run === run && progress(source, report));
    if (state.run === run) finish(source, run, result);
  } catch (error) {
    if (state.run !== run || error.name === "AbortError") return; // another file was opened, or Cancel pressed
    page.say("Stopped by an error");
    page.fail(error);
  } finally {
    if (state.run === run) state.run = null;
    render();
  }
}

function finish(source, run, result) {
  Object.assign(state, { result, id: run.id });
  if (result.spacing && !page.spacingGiven()) page.prefillSpacing(result.spacing);
  const [width, height] = result.size;
  if (!source.read) view.resize(width, height, source.depth);
  else if (width !== source.width || height !== source.height) {
    result.notes.push(`The endpoint read ${height} × ${width} pixels, this browser ${source.height} × ${source.width}; marks may be off.`);
  }
  const count = result.motors.length;
  page.say(`Done: ${count || "no"} motor${count === 1 ? "" : "s"} found`, result.presence === null ? "" : `Presence of a motor ${result.presence.toFixed(2)}`);
  if (shown().length) select(shown()[0]);
}

/** Stop the search that is under way, here and at the endpoint. */
function stop() {
  const { run } = state;
  if (!run) return;
  state.run = null;
  run.controller.abort();
  if (run.id) api.forget(run.id).catch((error) => error.status === 404 || page.fail(error)); // 404: it is gone already
}

function progress(source, report) {
  page.progress(report);
  const sizes = report.tomogram;
  if (source.read || source.width || !sizes?.size_x) return;
  view.resize(sizes.size_x, sizes.size_y, sizes.size_z);
  view.go(sizes.size_z / 2);
}

/** The model's description, asked for once, and again if that failed. */
function loadModel() {
  state.model ??= api.model(at("model").value).then(
    (model) => {
      page.showModel(model);
      render();
      return model;
    },
    (error) => {
      state.model = null;
      throw error;
    },
  );
  return state.model;
}

const threshold = () => Number(at("threshold").value);
const shown = () => atLeast(state.result?.motors ?? [], threshold());

function render() {
  const { source, result, run } = state;
  const motors = shown();
  if (!motors.some(({ rank }) => rank === state.selected)) state.selected = null;
  at("threshold-value").textContent = threshold().toFixed(2);
  at("summary").textContent = result ? summary(motors.length, result.motors.length, threshold()) : "";
  at("motors-head").hidden = !motors.length;
  fillList(at("motor-list"), motors, { hasDepth: source?.kind !== "slice", selected: state.selected, choose: select });
  view.show({ motors, selected: state.selected, spacing: page.spacingGiven() });
  page.showNotes([source?.note, ...(result?.notes ?? [])]);
  at("find").disabled = !source || run !== null;
  at("working").hidden = run === null;
  at("csv").disabled = !result;
  at("star").disabled = !result || source.kind === "slice";
}

async function select(motor) {
  state.selected = motor.rank;
  render();
  view.centre();
  await view.go(motor.z);
}

async function download(format) {
  const { source, id } = state;
  try {
    const local = () => new Blob([sliceCsv(source.name, shown(), page.spacingGiven())], { type: "text/csv" });
    const file = source.kind === "slice" ? local() : await api.motors(id, format, threshold());
    page.save(file, `${source.name.replace(/\.[^.]+$/, "")}_motors.${format}`);
  } catch (error) {
    page.fail(error);
  }
}

function on(id, kind, act) {
  at(id).addEventListener(kind, act);
}

on("file", "change", async () => {
  await choose(at("file").files);
  at("file").value = ""; // so that the same file can be chosen again
});
on("remote", "submit", (event) => {
  event.preventDefault();
  open(remote(at("uri").value.trim()));
});
on("find", "click", search);
on("cancel", "click", () => {
  stop();
  page.say("Cancelled");
  render();
  at("find").focus(); // the button that had the focus is gone
});
on("model", "change", () => {
  state.model = null;
  loadModel().catch(page.fail);
});
on("spacing", "input", () => {
  delete at("spacing").dataset.prefilled;
  render();
});
on("threshold", "input", render);
on("z", "input", () => view.source && view.go(Number(at("z").value)));
on("zoom", "change", () => view.setZoom(at("zoom").value));
on("auto", "click", () => view.autoContrast());
for (const id of ["low", "high"]) {
  on(id, "input", () => {
    if (!view.contrast) return; // the first slice is still being read
    view.setContrast(...page.contrastAfter(id));
    page.showContrast(view.contrast);
  });
}
for (const format of ["csv", "star"]) on(format, "click", () => download(format));
on("stage", "click", () => state.source ?? at("file").click());
on("canvas", "pointermove", (event) => page.showReadout(view.at(event), view.source.depth > 1, view.z));
on("canvas", "pointerleave", () => page.showReadout(null));

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dragging"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  choose(event.dataTransfer.files);
});

render();
loadModel().catch(page.fail);
