/* Small helpers for the page's elements. All texts of the library go in as text, never as markup. */

export const at = (id) => document.getElementById(id);

/** An element with properties and children; texts are children too. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** 75 -> "1:15". */
export function clock(seconds) {
  if (!Number.isFinite(seconds)) return "–:––";
  const whole = Math.floor(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

let hiding = 0;

/** Show a message for some seconds. */
export function tell(text) {
  const message = at("message");
  message.textContent = text;
  message.hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => { message.hidden = true; }, 6000);
}

/** Run an asynchronous action; what it throws is shown. */
export function attempt(action) {
  return Promise.resolve().then(action).catch((error) => tell(error.message));
}
