/* Keys of the whole page, which are off while something is typed. */

const isTyping = (target) => target.matches("input[type=search], input[type=text], select, textarea") || target.closest("dialog");

/** actions: what each key does; a key without one is left to the browser. */
export function connect(actions) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") {
      actions.Escape?.();
      return;
    }
    if (isTyping(event.target)) return;
    // On a button, a slider or a link the space bar has its own meaning.
    if (event.key === " " && event.target.matches("button, input, a")) return;
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
}
