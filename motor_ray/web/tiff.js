// The plain kind of TIFF that cryo-EM programs write: one uncompressed grey image of 8 or 16 bits in strips.
// No browser draws TIFF; of the many other kinds only the size is read, and the endpoint reads the rest.

const [WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, STRIPS, SAMPLES, COUNTS, FORMAT] = [256, 257, 258, 259, 262, 273, 277, 279, 339];
const BYTES = { 1: 1, 3: 2, 4: 4 }; // of a field's types BYTE, SHORT and LONG

export function isTiff(bytes) {
  const magic = String.fromCharCode(...bytes.subarray(0, 4));
  return magic === "II*\0" || magic === "MM\0*";
}

/** The first image of a TIFF as `{width, height, values}`; null if it is of another kind, or broken. */
export function readTiff(buffer) {
  try {
    return readPlain(new DataView(buffer));
  } catch (error) {
    if (error instanceof RangeError) return null; // an offset that leads out of the file
    throw error;
  }
}

function readPlain(view) {
  const little = view.getUint8(0) === 0x49;
  const fields = readFields(view, little);
  const one = (tag, otherwise) => fields.get(tag)?.[0] ?? otherwise;
  const [width, height, bits] = [one(WIDTH), one(HEIGHT), one(BITS, 1)];
  const plain = one(COMPRESSION, 1) === 1 && one(SAMPLES, 1) === 1 && one(PHOTOMETRIC, 1) <= 1 && one(FORMAT, 1) === 1;
  if (!plain || !width || !height || (bits !== 8 && bits !== 16) || !fields.has(STRIPS) || !fields.has(COUNTS)) return null;
  const values = new (bits === 8 ? Uint8Array : Uint16Array)(width * height);
  const inverted = one(PHOTOMETRIC, 1) === 0;
  let next = 0;
  fields.get(STRIPS).forEach((start, strip) => {
    const end = start + fields.get(COUNTS)[strip];
    for (let at = start; at < end && next < values.length; at += bits / 8) {
      const value = bits === 8 ? view.getUint8(at) : view.getUint16(at, little);
      values[next++] = inverted ? 2 ** bits - 1 - value : value;
    }
  });
  return next === values.length ? { width, height, values } : null;
}

/** Whole-number fields of the first directory, by tag. */
function readFields(view, little) {
  const start = view.getUint32(4, little);
  const fields = new Map();
  for (let entry = 0; entry < view.getUint16(start, little); entry++) {
    const at = start + 2 + 12 * entry;
    const [tag, size, count] = [view.getUint16(at, little), BYTES[view.getUint16(at + 2, little)], view.getUint32(at + 4, little)];
    if (!size || count > view.byteLength) continue;
    const place = size * count <= 4 ? at + 8 : view.getUint32(at + 8, little);
    const read = { 1: (i) => view.getUint8(i), 2: (i) => view.getUint16(i, little), 4: (i) => view.getUint32(i, little) }[size];
    fields.set(tag, Array.from({ length: count }, (_, i) => read(place + size * i)));
  }
  return fields;
}
