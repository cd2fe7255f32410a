// MRC volumes (.mrc, .rec, .map), a slice at a time by File.slice, so that a file larger than memory can be looked at.
// Reads what motor_ray/archive/mrc.py reads and refuses what it refuses.

const HEADER_BYTES = 1024;
const MAX_EDGE = 2 ** 20; // a longer edge is the sign of the wrong byte order, or of no MRC file at all
const IMOD_STAMP = 1146047817;
const MODES = { 0: Uint8Array, 1: Int16Array, 2: Float32Array, 6: Uint16Array, 12: Uint16Array };
const SUPPORTED = "0 (bytes), 1 (int16), 2 (float32), 6 (uint16) or 12 (float16)";

/** A file that cannot be drawn; the message says what was expected and what to do. */
export class FileError extends Error {}

/** What the first 1024 bytes (an ArrayBuffer) of a file of `fileBytes` say. Throws FileError. */
export function parseHeader(buffer, fileBytes, name) {
  const bytes = new Uint8Array(buffer);
  refuseCompressed(bytes, name);
  if (bytes.length < HEADER_BYTES) {
    throw new FileError(`${name} holds ${bytes.length} bytes, expected an MRC header of 1024; copy the file again.`);
  }
  const view = new DataView(buffer);
  const little = isLittleEndian(view, name);
  const int = (word) => view.getInt32(4 * word, little);
  const [width, height, depth, mode] = [0, 1, 2, 3].map(int);
  const axes = [16, 17, 18].map(int).join(", ");
  const offset = HEADER_BYTES + int(23);
  if (!(mode in MODES)) throw new FileError(`${name} is of MRC mode ${mode}, expected ${SUPPORTED}; convert it.`);
  if (axes !== "1, 2, 3" && axes !== "0, 0, 0") { // some writers leave the axes zero
    throw new FileError(`${name} stores its axes in the order (${axes}), expected (1, 2, 3); convert it.`);
  }
  if (offset < HEADER_BYTES || offset > fileBytes) {
    throw new FileError(`The header of ${name} claims to take ${offset} bytes of the file's ${fileBytes}; copy the file again.`);
  }
  const signed = mode === 0 && int(38) === IMOD_STAMP && (int(39) & 1) === 1;
  return { width, height, depth, mode, little, offset, signed, edges: voxelEdges(view, little) };
}

/** Voxel spacing in angstrom, the mean of the known edges; null where none is known or they are no cube's. */
export function spacing(edges) {
  const known = knownEdges(edges);
  if (!known.length || !isCube(known)) return null;
  // Six digits are what float32 holds: 13.328, not 13.32800006866455.
  return Number((known.reduce((sum, edge) => sum + edge) / known.length).toPrecision(6));
}

/** The volume in `file`: its sizes, spacing, and `read(z)` for the values of a slice. Throws FileError. */
export async function openMrc(file) {
  const header = parseHeader(await file.slice(0, HEADER_BYTES).arrayBuffer(), file.size, file.name);
  const stored = header.signed ? Int8Array : MODES[header.mode];
  const sliceBytes = header.width * header.height * stored.BYTES_PER_ELEMENT;
  const known = knownEdges(header.edges);
  return {
    kind: "tomogram",
    name: file.name,
    file,
    width: header.width,
    height: header.height,
    depth: header.depth,
    spacing: spacing(header.edges),
    note: isCube(known) ? "" : `The voxels are ${known.map((edge) => edge.toPrecision(4)).join(" × ")} Å (x, y, z), expected cubes; ` +
      "state the voxel spacing, then press Find motors.",
    async read(z) {
      const start = header.offset + z * sliceBytes;
      if (start + sliceBytes > file.size) {
        throw new FileError(`${file.name} ends within or before slice ${z} of ${header.depth}; copy the file again.`);
      }
      const buffer = await file.slice(start, start + sliceBytes).arrayBuffer();
      if (!header.little) swapBytes(buffer, stored.BYTES_PER_ELEMENT);
      const values = new stored(buffer);
      return header.mode === 12 ? fromFloat16(values) : values;
    },
  };
}

function refuseCompressed(bytes, name) {
  const starts = (...magic) => magic.every((byte, index) => bytes[index] === byte);
  for (const [kind, tool, found] of [["gzip", "gunzip", starts(0x1f, 0x8b)], ["bzip2", "bunzip2", starts(0x42, 0x5a, 0x68)]]) {
    if (found) throw new FileError(`${name} is compressed with ${kind}, so no slice can be read alone; ${tool} it first.`);
  }
}

/** The order in which the header makes sense, the machine stamp's first: the stamp is sometimes wrong. */
function isLittleEndian(view, name) {
  const first = view.getUint8(212) !== 0x11;
  const sizes = (little) => [0, 4, 8, 12].map((at) => view.getInt32(at, little));
  for (const little of [first, !first]) {
    const [width, height, depth, mode] = sizes(little);
    if ([width, height, depth].every((edge) => edge > 0 && edge <= MAX_EDGE) && mode >= 0 && mode < 256) return little;
  }
  const [width, height, depth, mode] = sizes(first);
  throw new FileError(
    `${name} is not an MRC file: its header gives ${width} x ${height} x ${depth} voxels of mode ${mode}, ` +
      `expected edges of 1 to ${MAX_EDGE} and mode ${SUPPORTED}.`,
  );
}

/** Cell lengths over grid counts along x, y, z; 0 where unknown. */
function voxelEdges(view, little) {
  return [0, 1, 2].map((axis) => {
    const count = view.getInt32(28 + 4 * axis, little);
    return count > 0 ? view.getFloat32(40 + 4 * axis, little) / count : 0;
  });
}

/** Without those of 0 or 1, which writers use for 'unknown'. */
function knownEdges(edges) {
  return edges.filter((edge) => Number.isFinite(edge) && edge > 0 && Math.abs(edge - 1) > 1e-4);
}

function isCube(edges) {
  return !edges.length || Math.max(...edges) <= 1.01 * Math.min(...edges);
}

/** In place. Every browser's own order is little-endian. */
function swapBytes(buffer, size) {
  if (size === 2) {
    const words = new Uint16Array(buffer);
    for (let i = 0; i < words.length; i++) words[i] = (words[i] << 8) | (words[i] >> 8);
  } else if (size === 4) {
    const view = new DataView(buffer);
    for (let at = 0; at < buffer.byteLength; at += 4) view.setUint32(at, view.getUint32(at, false), true);
  }
}

/** Not every browser has Float16Array yet; half floats are few enough to list. */
function fromFloat16(bits) {
  halves ??= Float32Array.from({ length: 65536 }, (_, half) => {
    const [sign, exponent, fraction] = [half >> 15 ? -1 : 1, (half >> 10) & 31, half & 1023];
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : (fraction / 1024) * 2 ** -14);
  });
  return Float32Array.from(bits, (half) => halves[half]);
}
let halves = null;
