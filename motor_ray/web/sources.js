// What is looked at: a slice image, a tomogram on this computer, or one that only the endpoint can read.
// A source has kind, name, width, height, depth, spacing (angstrom or null), note, and read(z) -> values, or null.

import { FileError, openMrc } from "./mrc.js";
import { isTiff, readTiff } from "./tiff.js";

const MRC_NAME = /\.(mrc|rec|map|mrcs|st|ali|preali)$/i;
const ELSEWHERE = "The voxels stay in the bucket; only the places of motors are shown, those of other slices dashed.";
const NOT_DRAWN = "This browser cannot draw this kind of image; the endpoint may still read it, and the motors are marked on an empty field.";

/** The source in `file`. Throws FileError if it is neither an image nor an MRC volume. */
export async function openFile(file) {
  if (!file.size) throw new FileError(`${file.name} is empty; copy the file again.`);
  const start = new Uint8Array(await file.slice(0, 16).arrayBuffer());
  if (isTiff(start)) return openTiff(file);
  // By content first: a JPEG named .map is a JPEG.
  if (isPicture(start)) return openPicture(file);
  if (MRC_NAME.test(file.name) || !file.type.startsWith("image/")) return openMrc(file);
  throw new FileError(`${file.name} is neither a JPEG, PNG or TIFF image nor an MRC tomogram; convert it.`);
}

/** A tomogram at `uri`, of which only places will be known, and its sizes once the endpoint has opened it. */
export function remote(uri) {
  return { kind: "remote", name: uri.split("/").at(-1) || uri, uri, width: 0, height: 0, depth: 1, spacing: null, note: ELSEWHERE, read: null };
}

function isPicture(bytes) {
  const [a, b, c] = bytes;
  return (a === 0xff && b === 0xd8 && c === 0xff) || (a === 0x89 && b === 0x50 && c === 0x4e);
}

async function openTiff(file) {
  const image = readTiff(await file.arrayBuffer());
  return image ? slice(file, image) : { ...slice(file, { width: 0, height: 0 }), note: NOT_DRAWN, read: null };
}

async function openPicture(file) {
  let bitmap;
  try {
    // A colour profile is about screens; the endpoint's grey values know none.
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new FileError(`${file.name} cannot be decoded; copy or convert the file again.`);
  }
  const { width, height } = bitmap;
  const pen = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  pen.drawImage(bitmap, 0, 0);
  bitmap.close();
  return slice(file, { width, height, values: grey(pen.getImageData(0, 0, width, height).data) });
}

function slice(file, { width, height, values }) {
  return { kind: "slice", name: file.name, file, width, height, depth: 1, spacing: null, note: "", read: async () => values };
}

/** Red, green, blue to grey with the weights of ITU-R BT.601, which the endpoint's decoder uses. */
function grey(rgba) {
  const values = new Uint8Array(rgba.length / 4);
  for (let i = 0; i < values.length; i++) {
    values[i] = Math.round(0.299 * rgba[4 * i] + 0.587 * rgba[4 * i + 1] + 0.114 * rgba[4 * i + 2]);
  }
  return values;
}
