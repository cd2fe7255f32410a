// The list of motors as buttons, and the words about them.

import { placeOf } from "./motors.js";

/** Fill `list` with a button for each of `motors`; `choose(motor)` is called when one is pressed. */
export function fillList(list, motors, { hasDepth, selected, choose }) {
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.rank : null;
  list.replaceChildren(...motors.map((motor) => itemOf(motor, hasDepth, motor.rank === selected, choose)));
  // New buttons took the place of the old, and with them the focus.
  if (focused !== null) list.querySelector(`[data-rank="${focused}"]`)?.focus();
}

/** "3 of 5 motors", and where nothing is shown, why. */
export function summary(shown, all, threshold) {
  const noun = all === 1 ? "motor" : "motors";
  if (!all) return "No motors found.";
  if (!shown) return `None of ${all} ${noun} reaches ${threshold.toFixed(2)}; lower the threshold to see more.`;
  return shown === all ? `${all} ${noun}` : `${shown} of ${all} ${noun}`;
}

function itemOf(motor, hasDepth, selected, choose) {
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.rank = motor.rank;
  button.setAttribute("aria-label", `Motor ${motor.rank}, score ${motor.score.toFixed(2)}, ${placeOf(motor, hasDepth)}`);
  if (selected) button.setAttribute("aria-current", "true");
  const cells = [motor.rank, motor.score.toFixed(2), hasDepth ? motor.z.toFixed(1) : "–", motor.y.toFixed(1), motor.x.toFixed(1)];
  button.append(...cells.map(cell));
  button.addEventListener("click", () => choose(motor));
  const item = document.createElement("li");
  item.append(button);
  return item;
}

function cell(text) {
  const made = document.createElement("span");
  made.textContent = text;
  return made;
}
