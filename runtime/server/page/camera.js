/** Taking a picture: with the phone's camera app, or with a webcam in a dialog. */

import { jpeg } from "./picture.js";

/**
 * Let `button` take pictures, and show it where that is possible.
 *
 * @param {object} parts
 * @param {HTMLButtonElement} parts.button
 * @param {HTMLInputElement} parts.capture A file input with `capture`, which opens a phone's own camera.
 * @param {HTMLDialogElement} parts.dialog
 * @param {HTMLVideoElement} parts.video
 * @param {HTMLButtonElement} parts.take
 * @param {HTMLButtonElement} parts.close
 * @param {(blob: Blob) => void} onPicture
 * @param {(message: string) => void} onProblem
 */
export function setUpCamera({ button, capture, dialog, video, take, close }, onPicture, onProblem) {
  // A phone's own camera also works where the page came without TLS, and focuses better.
  const phone = matchMedia("(pointer: coarse)").matches;
  if (!phone && !navigator.mediaDevices?.getUserMedia) return;
  button.hidden = false;
  button.addEventListener("click", phone ? () => capture.click() : open);
  take.addEventListener("click", shoot);
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", stop);
  video.addEventListener("loadeddata", () => {
    take.disabled = false;
    take.focus();
  });

  async function open() {
    take.disabled = true;
    dialog.showModal();
    try {
      const wanted = { width: { ideal: 1920 }, facingMode: "environment" };
      const stream = await navigator.mediaDevices.getUserMedia({ video: wanted });
      if (dialog.open) video.srcObject = stream;
      else stream.getTracks().forEach((track) => track.stop()); // cancelled while the browser asked
    } catch (error) {
      if (dialog.open) dialog.close();
      onProblem(problem(error));
    }
  }

  async function shoot() {
    try {
      onPicture(await jpeg(video, video.videoWidth, video.videoHeight));
    } catch (error) {
      onProblem(error);
    }
    dialog.close();
  }

  function stop() {
    video.srcObject?.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
  }
}

function problem({ name, message }) {
  if (name === "NotAllowedError") return "The browser was not allowed to use the camera.";
  if (name === "NotFoundError") return "No camera was found.";
  return `The camera could not be used: ${message}`;
}
