// Pictures and videos before they are sent: read, scaled down where they are large, refused with a reason.

const MEGABYTE = 1e6;
export const LIMITS = {
  side: 2048, // pixels; a model that reads at most 1280 tokens a picture sees no more
  asIs: 2 * MEGABYTE, // a smaller file of a known format is sent untouched
  picture: 100 * MEGABYTE,
  video: 60 * MEGABYTE,
  count: 16,
};
const SENT_AS_IS = new Set(["image/jpeg", "image/png", "image/webp"]);
const VIDEOS = new Set(["video/mp4", "video/webm", "video/quicktime", "video/x-matroska", "video/x-msvideo"]);
const VIDEO_NAMES = /\.(mp4|m4v|webm|mov|mkv|avi)$/i;

/**
 * A file as something to send: {kind: "image" | "video", name, blob, width, height}; a picture has its size.
 * Throws an Error with a line for the user.
 */
export async function attachment(file) {
  const name = file.name || "picture";
  if (!file.size) throw new Error(`${name} is empty.`);
  if (file.type.startsWith("image/")) return picture(file, name);
  if (VIDEOS.has(file.type) || VIDEO_NAMES.test(name)) return video(file, name);
  throw new Error(`${name} is neither a picture nor a video that can be sent.`);
}

async function picture(file, name) {
  if (file.size > LIMITS.picture) {
    throw new Error(`${name} has ${megabytes(file.size)}; pictures may have ${megabytes(LIMITS.picture)}.`);
  }
  const bitmap = await decoded(file, name);
  const scale = Math.min(1, LIMITS.side / Math.max(bitmap.width, bitmap.height));
  const untouched = scale === 1 && file.size <= LIMITS.asIs && SENT_AS_IS.has(file.type);
  const width = Math.max(1, Math.round(bitmap.width * scale));
  const height = Math.max(1, Math.round(bitmap.height * scale));
  const blob = untouched ? file : await drawn(bitmap, width, height);
  bitmap.close();
  return { kind: "image", name, blob, width, height };
}

async function decoded(file, name) {
  try {
    return await createImageBitmap(file); // turned upright as its EXIF data says
  } catch {
    throw new Error(`This browser cannot read ${name} (${file.type}). Save it as JPEG or PNG and try again.`);
  }
}

async function drawn(bitmap, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white"; // JPEG knows no transparency
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

function video(file, name) {
  if (file.size > LIMITS.video) {
    const most = megabytes(LIMITS.video);
    throw new Error(`${name} has ${megabytes(file.size)}; videos may have ${most}. Shorten it or lower its resolution.`);
  }
  return { kind: "video", name, blob: file };
}

function megabytes(bytes) {
  return `${(bytes / MEGABYTE).toFixed(bytes < 10 * MEGABYTE ? 1 : 0)} MB`;
}

/** A file's content as a data: address, as the protocol takes it. */
export function dataAddress(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("A picture of this chat cannot be read any more."));
    reader.readAsDataURL(blob);
  });
}
