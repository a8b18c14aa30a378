/** Where pictures come from: files, the clipboard, what is dropped, and the camera. */

import { setUpCamera } from "./camera.js";

/**
 * Listen to everything that can bring a picture.
 *
 * @param {(id: string) => HTMLElement} part Finds a part of the page.
 * @param {(blob: Blob, name: string) => void} onPicture
 * @param {(message: string) => void} onProblem
 */
export function takePictures(part, onPicture, onProblem) {
  for (const input of [part("file"), part("capture")]) {
    input.addEventListener("change", () => {
      const [file] = input.files;
      if (file) onPicture(file, file.name);
      input.value = ""; // so that the same file can be chosen again
    });
  }

  document.addEventListener("paste", ({ clipboardData, target }) => {
    // Office programs put a picture of a text beside it: where text can go, the text is meant.
    if (clipboardData.types.includes("text/plain") && target.matches?.("textarea, input")) return;
    const file = [...clipboardData.files].find(({ type }) => type.startsWith("image/"));
    if (file) onPicture(file, "Pasted picture");
  });

  takeDrops(part("frame"), onPicture, onProblem);

  setUpCamera(
    {
      button: part("camera-open"),
      capture: part("capture"),
      dialog: part("camera"),
      video: part("video"),
      take: part("camera-take"),
      close: part("camera-close"),
    },
    (blob) => onPicture(blob, "Camera picture"),
    onProblem,
  );
}

/** All of the page takes a drop, and `frame` shows it: a near miss would make the browser leave the page. */
function takeDrops(frame, onPicture, onProblem) {
  let entered = 0; // each element below the pointer enters and leaves by itself
  const mark = (change) => {
    entered = Math.max(0, entered + change);
    frame.classList.toggle("over", entered > 0);
  };
  document.addEventListener("dragenter", () => mark(1));
  document.addEventListener("dragleave", () => mark(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    mark(-entered);
    const [file] = event.dataTransfer.files;
    if (file) onPicture(file, file.name);
    else onProblem("What was dropped is not a file. Save the picture first, or copy and paste it.");
  });
}
