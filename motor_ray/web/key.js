// The dialog that asks for the endpoint's key.

/** A function for Api: shows `dialog` and resolves to the key, or to null if the person closes it. */
export function keyDialog(dialog) {
  const field = dialog.querySelector("input");
  const refusal = dialog.querySelector(".refusal");
  return (refused) =>
    new Promise((resolve) => {
      field.value = "";
      refusal.hidden = !refused;
      dialog.returnValue = "";
      dialog.addEventListener("close", () => resolve(dialog.returnValue === "use" ? field.value.trim() : null), { once: true });
      dialog.showModal();
    });
}
