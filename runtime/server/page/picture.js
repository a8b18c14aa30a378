/** Pictures: made ready to be sent, and drawn with the tokens that were kept. */

const LONG_SIDE = 2048;
const QUALITY = 0.92;
// What every server reads as it is; a browser opens more, such as AVIF or HEIC, which are sent as JPEG.
const SENT_AS_THEY_ARE = new Set(["image/jpeg", "image/png", "image/webp"]);

const DIM = [10, 9, 8];
const DIM_ALPHA = 0.8;
const GLOW = [255, 197, 61];
// The colour of what pads a picture to the encoder's shape, about the mean of photographs.
const PADDING = "#7b746b";
const STAGGER_MS = 420;
const RISE_MS = 280;

/** A file that cannot be used as a picture; the message is for the person who gave it. */
export class PictureError extends Error {}

/**
 * @typedef {object} Picture
 * @property {string} url Data URI of what is sent.
 * @property {ImageBitmap} bitmap Upright, as it is sent.
 * @property {string} name
 * @property {string} note What was done to it, for people.
 */

/**
 * Read a file as a picture, and make it smaller where it is larger than the server needs or takes.
 *
 * @param {Blob} blob
 * @param {string} name
 * @param {{maxPixels?: number, maxBytes?: number}} [limits] The server's; `maxBytes` is of a whole request.
 * @returns {Promise<Picture>}
 */
export async function preparePicture(blob, name, { maxPixels = Infinity, maxBytes = Infinity } = {}) {
  const original = await createImageBitmap(blob).catch(() => {
    throw new PictureError(`${name} is not a picture that this browser can open. JPEG, PNG and WebP always work.`);
  });
  const { width, height } = original;
  const scale = Math.min(1, LONG_SIDE / Math.max(width, height), Math.sqrt(maxPixels / (width * height)));
  // Base64 takes 4 bytes for 3; the rest of a request is its text.
  const fits = blob.size * 4 / 3 < 0.9 * maxBytes;
  const size = `${width} × ${height}`;
  if (scale === 1 && fits && SENT_AS_THEY_ARE.has(blob.type)) {
    return { url: await dataUri(blob), bitmap: original, name, note: `${name}, ${size}` };
  }
  const [wide, high] = [width, height].map((side) => Math.max(1, Math.floor(side * scale)));
  const sent = await jpeg(original, wide, high).finally(() => original.close());
  const bitmap = await createImageBitmap(sent);
  const how = scale < 1 ? `a smaller JPEG of ${bitmap.width} × ${bitmap.height}` : "JPEG";
  return { url: await dataUri(sent), bitmap, name, note: `${name}, ${size}, sent as ${how}` };
}

/**
 * Return `source` as a JPEG of the given size; what is transparent becomes white.
 *
 * @param {CanvasImageSource} source
 * @returns {Promise<Blob>}
 */
export function jpeg(source, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, width, height);
  return new Promise((resolve, reject) => {
    const take = (blob) => (blob ? resolve(blob) : reject(new PictureError("The picture is too large.")));
    canvas.toBlob(take, "image/jpeg", QUALITY);
  });
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new PictureError("The picture could not be read."));
    reader.readAsDataURL(blob);
  });
}

/**
 * @typedef {object} Selection As the server reports it for one picture.
 * @property {[number, number][]} grids Rows and columns of the grids that the tokens form one after the other.
 * @property {number[]} kept_indices
 * @property {[number, number, number, number]} view What the encoder sees: left, top, right, bottom as fractions of the
 *   upright picture; beyond 0 and 1 where it is padded.
 */

/** Return which cells of which grid are kept, leaving grids without cells out. */
export function keptCells({ grids, kept_indices: kept }) {
  let first = 0;
  const all = new Set(kept);
  return grids.flatMap(([rows, columns]) => {
    const start = first;
    first += rows * columns;
    if (rows * columns === 0) return [];
    return [{ rows, columns, lit: Array.from({ length: rows * columns }, (_, cell) => all.has(start + cell)) }];
  });
}

/** Return how many visual tokens a picture has. */
export function tokenCount({ grids }) {
  return grids.reduce((sum, [rows, columns]) => sum + rows * columns, 0);
}

/** Draws a picture into a canvas that fills its frame: kept tokens bright, the rest dimmed. */
export class PictureView {
  #canvas;
  #context;
  #mask = document.createElement("canvas"); // one pixel for each token, stretched over the picture
  #bitmap = null;
  #selection = null;
  #grid = 0;
  #lit = true;
  #since = 0;
  #frame = 0;
  #still = matchMedia("(prefers-reduced-motion: reduce)");

  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    new ResizeObserver(() => this.#redraw()).observe(canvas);
  }

  /** Show a picture as it is. */
  setPicture(bitmap) {
    this.#bitmap?.close();
    this.#bitmap = bitmap;
    this.setSelection(null);
  }

  /** Light up what was kept: a {@link Selection}, or null for the picture alone. */
  setSelection(selection) {
    this.#selection = selection;
    this.#grid = selection ? keptCells(selection).length - 1 : 0; // the last is the finest
    const [left, top, right, bottom] = this.#bounds();
    const shape = ((right - left) * this.#bitmap.width) / ((bottom - top) * this.#bitmap.height);
    this.#canvas.parentElement.style.setProperty("--shape", shape);
    this.#restart();
  }

  get grid() {
    return this.#grid;
  }

  /** Choose which of several grids is shown. */
  set grid(number) {
    this.#grid = number;
    this.#restart();
  }

  /** Whether kept tokens are shown, or the picture alone. */
  set lit(lit) {
    this.#lit = lit;
    this.#restart();
  }

  /** The picture together with what the encoder sees of and around it, as fractions of the picture. */
  #bounds() {
    const [left, top, right, bottom] = this.#selection?.view ?? [0, 0, 1, 1];
    return [Math.min(0, left), Math.min(0, top), Math.max(1, right), Math.max(1, bottom)];
  }

  #restart() {
    this.#since = performance.now();
    this.#redraw();
  }

  #redraw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame((now) => {
      const passed = this.#still.matches ? Infinity : now - this.#since;
      this.#draw(passed);
      if (this.#selection && this.#lit && passed < STAGGER_MS + RISE_MS) this.#redraw();
    });
  }

  #draw(passed) {
    const canvas = this.#canvas;
    const context = this.#context;
    canvas.width = Math.round(canvas.clientWidth * devicePixelRatio);
    canvas.height = Math.round(canvas.clientHeight * devicePixelRatio);
    if (!this.#bitmap || !canvas.width || !canvas.height) return;

    const [left, top, right, bottom] = this.#bounds();
    const { width, height } = this.#bitmap;
    const scale = Math.min(canvas.width / ((right - left) * width), canvas.height / ((bottom - top) * height));
    const originX = (canvas.width - (left + right) * width * scale) / 2;
    const originY = (canvas.height - (top + bottom) * height * scale) / 2;
    const place = ([x0, y0, x1, y1]) => {
      const [x, y] = [Math.round(originX + x0 * width * scale), Math.round(originY + y0 * height * scale)];
      return [x, y, Math.round(originX + x1 * width * scale) - x, Math.round(originY + y1 * height * scale) - y];
    };

    const whole = place([left, top, right, bottom]);
    context.fillStyle = PADDING;
    context.fillRect(...whole);
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.#bitmap, ...place([0, 0, 1, 1]));
    if (!this.#selection || !this.#lit) return;

    const seen = place(this.#selection.view);
    const cells = keptCells(this.#selection)[this.#grid];
    context.fillStyle = `rgb(${DIM.join(" ")} / ${DIM_ALPHA * ease(passed / RISE_MS)})`;
    context.beginPath();
    context.rect(...whole);
    context.rect(...seen);
    context.fill("evenodd"); // what the encoder never sees
    this.#paintMask(cells, passed);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.#mask, ...seen);
    if (cells.lit.includes(false)) outline(context, cells, seen, ease((passed - STAGGER_MS) / RISE_MS));
  }

  #paintMask({ rows, columns, lit }, passed) {
    this.#mask.width = columns;
    this.#mask.height = rows;
    const context = this.#mask.getContext("2d");
    const image = context.createImageData(columns, rows);
    lit.forEach((kept, cell) => {
      // Steps of the golden ratio spread the order over the picture: it twinkles instead of being wiped.
      const delay = ((cell * 0.618034) % 1) * STAGGER_MS;
      const risen = kept ? ease((passed - delay) / RISE_MS) : 0;
      const dimmed = DIM_ALPHA * ease(passed / RISE_MS);
      const glow = kept ? 0.85 * Math.sin(Math.PI * risen) : 0;
      const colour = kept && risen > 0 ? GLOW : DIM;
      const alpha = kept && risen > 0 ? glow : dimmed;
      image.data.set([...colour, Math.round(255 * alpha)], 4 * cell);
    });
    context.putImageData(image, 0, 0);
  }
}

/** Draw the border between kept tokens and others. */
function outline(context, { rows, columns, lit }, [left, top, width, height], alpha) {
  const at = (row, column) => row >= 0 && row < rows && column >= 0 && column < columns && lit[row * columns + column];
  const x = (column) => left + (column * width) / columns;
  const y = (row) => top + (row * height) / rows;
  context.beginPath();
  for (let row = 0; row <= rows; row++) {
    for (let column = 0; column <= columns; column++) {
      if (at(row, column) !== at(row - 1, column)) {
        context.moveTo(x(column), y(row));
        context.lineTo(x(column + 1), y(row));
      }
      if (at(row, column) !== at(row, column - 1)) {
        context.moveTo(x(column), y(row));
        context.lineTo(x(column), y(row + 1));
      }
    }
  }
  context.strokeStyle = `rgb(${GLOW.join(" ")} / ${0.9 * alpha})`;
  context.lineWidth = 1.25 * devicePixelRatio;
  context.lineCap = "square";
  context.stroke();
}

/** Smooth step from 0 to 1. */
function ease(part) {
  const t = Math.min(1, Math.max(0, part));
  return t * t * (3 - 2 * t);
}
