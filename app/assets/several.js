// The pictures of one object as a strip of thumbnails: adds some, turns to one, removes one.
// In: props.here (whether the page's controls hold a picture), props.now (its thumbnail),
// props.thumbs (thumbnails of others by file), props.most (how many pictures there may be).
// In and out: props.value, the JSON that app/several.py reads. `element`, `props`, `trigger`,
// `upload` and `watch` are Gradio's.
const list = element.querySelector("ol");
const button = element.querySelector(".several-add");
const chooser = element.querySelector("input");
const hint = element.querySelector(".several-hint");

const EMPTY = { others: [], at: 0, given: null, thumb: "" };
let held = EMPTY;
let here = false; // whether the controls hold a picture, which has its place among the others

// File and thumbnail of all pictures in order; the file of the controls' own is "".
function pictures() {
  const all = held.others.map(({ picture, thumb }) => ({ file: picture, thumb }));
  if (here) all.splice(held.at, 0, { file: "", thumb: held.thumb });
  return all;
}

function part(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function tile({ file, thumb }, place, { length: count }) {
  const which = `Picture ${place + 1} of ${count}`;
  const image = part("img", { alt: "" });
  if (thumb) image.src = thumb;
  const turn = part(
    "button",
    { type: "button", className: "several-turn", onclick: () => file && wish({ turn: file }) },
    image,
    part("span", { textContent: place + 1 })
  );
  turn.setAttribute("aria-label", file ? `${which}: show it` : `${which}, shown`);
  turn.setAttribute("aria-current", String(!file));
  const remove = part("button", {
    type: "button", className: "several-remove", textContent: "×", title: "Remove",
    onclick: () => wish({ remove: file }),
  });
  remove.setAttribute("aria-label", `Remove picture ${place + 1}`);
  return part("li", {}, turn, remove);
}

function show() {
  const all = pictures();
  const focused = list.contains(document.activeElement);
  list.replaceChildren(...(held.others.length ? all.map(tile) : []));
  list.hidden = !held.others.length;
  button.hidden = !all.length;
  button.disabled = all.length >= props.most;
  hint.textContent =
    held.others.length && here
      ? `Picture ${held.at + 1} of ${all.length} is shown; select another to mark it.`
      : "";
  if (focused) (list.querySelector("[aria-current=true]") || button).focus();
}

function wish(wanted) {
  props.value = JSON.stringify({ ...held, wanted });
  trigger("input");
}

async function add(files) {
  const some = [...files].slice(0, props.most + 1); // what is too many is said by the server
  const paths = [];
  for (const file of some) {
    hint.textContent = `Uploading ${paths.length + 1} of ${some.length} …`;
    try {
      paths.push((await upload(file)).path);
    } catch {
      hint.textContent = `${file.name} could not be uploaded; it may be too large.`;
      return;
    }
  }
  show();
  if (paths.length) wish({ add: paths });
}

button.addEventListener("click", () => chooser.click());
chooser.addEventListener("change", async () => {
  await add(chooser.files);
  chooser.value = "";
});

// Several files at once may be dropped on the picture, too, which itself takes one.
function isOurs({ target, dataTransfer }) {
  const files = [...(dataTransfer?.items || [])].filter(({ kind }) => kind === "file");
  if (element.contains(target)) return files.length > 0 && !button.hidden;
  return files.length > 1 && Boolean(target.closest?.("#picture"));
}

document.addEventListener("dragover", (event) => isOurs(event) && event.preventDefault(), true);
document.addEventListener(
  "drop",
  (event) => {
    if (!isOurs(event)) return;
    event.preventDefault();
    event.stopPropagation();
    add(event.dataTransfer.files);
  },
  true
);

// By the server, after each wish.
function valueChanged() {
  held = props.value ? JSON.parse(props.value) : EMPTY;
  delete held.wanted;
  show();
}

function lookedAt() {
  here = props.here;
  held = { ...held, thumb: props.now };
  show();
}

function glanced() {
  const seen = ({ picture, thumb }) => thumb || props.thumbs[picture] || "";
  held = { ...held, others: held.others.map((one) => ({ ...one, thumb: seen(one) })) };
  show();
}

watch("value", valueChanged);
watch(["now", "here"], lookedAt);
watch("thumbs", glanced);
show();
