// One search: send what is open, wait, hand back what was found. Knows the API, not the page.

import { Problem } from "./api.js";
import { ranked } from "./motors.js";

/**
 * Find the motors of `source` with `query` (voxel_spacing_angstrom, model).
 *
 * `run` is {controller, id}; a tomogram's id is put there as soon as it is known, so that it can be stopped.
 * `report` gets {status, detail, share}, share null where it is not known, and {tomogram} for each answer about one.
 * Resolves to {motors, notes, presence, size: [width, height], spacing}. Throws Problem, or AbortError when stopped.
 */
export async function find(api, source, query, run, report) {
  const { signal } = run.controller;
  const onUpload = (sent, total) => report(uploading(source.name, sent, total));
  if (source.kind === "slice") {
    const answer = await api.slice(source.file, query, signal, onUpload);
    return {
      motors: ranked(answer),
      presence: answer.presence,
      notes: [answer.note].filter(Boolean),
      size: [answer.width, answer.height],
      spacing: null,
    };
  }
  const queued = await api.tomogram(source.file ?? source.uri, query, signal, onUpload);
  run.id = queued.id;
  const last = await api.follow(queued, signal, (tomogram) => report({ ...looking(tomogram), tomogram }));
  if (last.status === "failed") throw new Problem(last.problem ?? { title: "The endpoint could not look at this tomogram" });
  return {
    motors: ranked(last),
    presence: null,
    notes: unread(last.failures ?? []),
    size: [last.size_x, last.size_y],
    spacing: last.voxel_spacing_angstrom,
  };
}

/** Why `source` need not be sent to an endpoint of these `limits`; null if it may. */
export function refusal(source, limits) {
  if (source.kind !== "slice" && limits?.uploads === false) {
    return new Problem({
      title: "This endpoint takes no tomograms",
      detail: "The slices can be looked at here; motors are found on single slices only.",
    });
  }
  const most = { slice: limits?.image_bytes, tomogram: limits?.tomogram_bytes }[source.kind];
  if (!most || source.file.size <= most) return null;
  return new Problem({
    title: "The file is too large for this endpoint",
    detail: `${source.name} has ${megabytes(source.file.size)} MB, expected at most ${megabytes(most)} MB.`,
  });
}

function uploading(name, sent, total) {
  if (sent >= total) return { status: "Waiting for the answer", detail: "", share: null };
  return { status: `Uploading ${name}`, detail: `${megabytes(sent)} of ${megabytes(total)} MB`, share: sent / total };
}

function looking({ status, slices_done: done, slices_planned: planned }) {
  if (status === "queued") return { status: "Waiting for its turn", detail: "", share: null };
  const detail = planned ? `${done} of ${planned} slices` : "";
  return { status: "Looking at the slices", detail, share: planned ? done / planned : null };
}

function unread(failures) {
  if (!failures.length) return [];
  const some = failures.slice(0, 3).map(({ z, error }) => (z === null ? error : `z ${z}: ${error}`));
  const more = failures.length > 3 ? `; and ${failures.length - 3} more` : "";
  return [`${failures.length === 1 ? "1 slice" : `${failures.length} slices`} could not be read: ${some.join("; ")}${more}`];
}

function megabytes(bytes) {
  return (bytes / 1e6).toFixed(bytes < 1e7 ? 2 : 0);
}
