// Marks an object on a square picture: strokes and a box, by mouse, finger or keyboard.
// In: props.picture (an image as data URL), props.method, props.clicks (a box may be a mere click).
// Out: props.value, the JSON that app/marking.py reads, all in shares of the side. `element`, `props`,
// `trigger` and `watch` are Gradio's.
const image = element.querySelector("img");
const canvas = element.querySelector("canvas");
const width = element.querySelector("input[type=range]");
const tools = [...element.querySelectorAll("[data-tool]")];
const boxTool = element.querySelector("[data-tool=box]");
const hint = element.querySelector(".marker-hint");
const KEY_STEP = 0.02;
const HANDLE = 0.02;
const NEAR = 0.1; // of the brush's width: closer points add nothing to a stroke

let box = null;
let strokes = [];
let tool = "paint";
let current = null; // the stroke or the box that is being drawn
let fresh = []; // strokes that the server has not shown yet
let cursor = null; // [x, y] of the keyboard

function choose(name) {
  tool = name;
  for (const button of tools) {
    button.setAttribute("aria-pressed", String(button.dataset.tool === name));
  }
}

function show() {
  const side = (canvas.width = canvas.height = Math.round(
    canvas.clientWidth * (window.devicePixelRatio || 1)
  ));
  const pen = canvas.getContext("2d");
  pen.lineCap = pen.lineJoin = "round";
  for (const stroke of current && current.points ? [...fresh, current] : fresh) {
    pen.strokeStyle = stroke.erase ? "rgba(0, 0, 0, 0.6)" : "rgba(255, 0, 160, 0.6)";
    pen.lineWidth = Math.max(1, stroke.width * side);
    pen.beginPath();
    stroke.points.forEach(([x, y]) => pen.lineTo(x * side, y * side));
    if (stroke.points.length === 1) {
      pen.lineTo(stroke.points[0][0] * side + 0.1, stroke.points[0][1] * side);
    }
    pen.stroke();
  }
  const shown = current && current.from ? ordered(current) : box;
  if (shown && props.method === "box" && isClick(shown)) cross(pen, shown, side);
  else if (shown && props.method === "box") {
    const [left, top, right, bottom] = shown.map((share) => share * side);
    for (const [colour, line] of [["black", 4], ["white", 2]]) {
      pen.strokeStyle = colour;
      pen.lineWidth = (line * side) / canvas.clientWidth;
      pen.strokeRect(left, top, right - left, bottom - top);
    }
  }
  if (cursor && document.activeElement === canvas) cross(pen, cursor, side);
}

function cross(pen, at, side) {
  const [x, y] = at.map((share) => share * side);
  for (const [colour, line] of [["black", 4], ["white", 2]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = (line * side) / canvas.clientWidth;
    pen.beginPath();
    pen.moveTo(x - HANDLE * side, y);
    pen.lineTo(x + HANDLE * side, y);
    pen.moveTo(x, y - HANDLE * side);
    pen.lineTo(x, y + HANDLE * side);
    pen.stroke();
  }
}

const isClick = ([left, top, right, bottom]) => left === right && top === bottom;

const ordered = ({ from, to }) => [
  Math.min(from[0], to[0]), Math.min(from[1], to[1]),
  Math.max(from[0], to[0]), Math.max(from[1], to[1]),
];

function send() {
  props.value = box || strokes.length ? JSON.stringify({ box, strokes }) : "";
  trigger("input");
}

function begin(point) {
  current =
    tool === "box"
      ? { from: point, to: point }
      : { points: [point], width: Number(width.value), erase: tool === "erase" };
  show();
}

function move(point) {
  if (!current) return;
  if (current.from) current.to = point;
  else extend(current, point);
  show();
}

// Its last point follows the pointer and stays once the next one is away from it: a slow hand sends
// many, and the server takes MAX_POINTS.
function extend({ points, width }, point) {
  const [last, before] = [points.at(-1), points.at(-2)];
  const isNear = before && Math.hypot(last[0] - before[0], last[1] - before[1]) < NEAR * width;
  if (isNear) points.pop();
  points.push(point);
}

function end() {
  if (!current) return;
  if (current.from) {
    let drawn = ordered(current);
    // A hand that shakes while it clicks.
    if (props.clicks && drawn[2] - drawn[0] < HANDLE && drawn[3] - drawn[1] < HANDLE) {
      drawn = [...current.from, ...current.from];
    }
    const [left, top, right, bottom] = drawn;
    if ((right > left && bottom > top) || (props.clicks && isClick(drawn))) box = drawn;
  } else {
    strokes.push(current);
    fresh.push(current);
  }
  current = null;
  show();
  send();
}

const clamp = (share) => Math.min(1, Math.max(0, Math.round(share * 1e4) / 1e4));

function point(event) {
  const area = canvas.getBoundingClientRect();
  return [
    clamp((event.clientX - area.left) / area.width),
    clamp((event.clientY - area.top) / area.height),
  ];
}

canvas.addEventListener("pointerdown", (event) => {
  if (!image.getAttribute("src") || event.button) return;
  canvas.setPointerCapture(event.pointerId);
  cursor = null;
  begin(point(event));
});
canvas.addEventListener("pointermove", (event) => move(point(event)));
canvas.addEventListener("pointerup", end);
canvas.addEventListener("pointercancel", end);
canvas.addEventListener("blur", show);
canvas.addEventListener("focus", show);

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
canvas.addEventListener("keydown", (event) => {
  if (!image.getAttribute("src")) return;
  cursor = cursor || [0.5, 0.5];
  if (ARROWS[event.key]) {
    const step = event.shiftKey ? KEY_STEP / 4 : KEY_STEP;
    cursor = cursor.map((share, axis) => clamp(share + step * ARROWS[event.key][axis]));
    move(cursor);
  } else if (event.key === " " || event.key === "Enter") {
    if (current) end();
    else begin(cursor);
  } else if (event.key === "Escape" && current) {
    current = null;
  } else {
    return;
  }
  event.preventDefault();
  show();
});

for (const button of tools) button.addEventListener("click", () => choose(button.dataset.tool));
element.querySelector("[data-do=undo]").addEventListener("click", () => {
  if (strokes.length) strokes.pop();
  else box = null;
  fresh = [];
  send();
  show();
});
element.querySelector("[data-do=clear]").addEventListener("click", () => {
  box = null;
  strokes = [];
  fresh = [];
  send();
  show();
});

function pictureChanged() {
  if (props.picture) image.setAttribute("src", props.picture);
  else image.removeAttribute("src");
  fresh = [];
  show();
}

function methodChanged() {
  boxTool.hidden = props.method !== "box";
  choose(props.method === "box" ? "box" : "paint");
  hint.textContent = {
    box: props.clicks
      ? "Click on the object or draw a box around it. Then paint or erase what was got wrong."
      : "Draw a box around the object. Then paint or erase what GrabCut got wrong.",
    brush: "Paint over the object.",
  }[props.method] || "Paint or erase what was got wrong.";
  show();
}

// The server empties the marks with every new picture.
function valueChanged() {
  const marks = props.value ? JSON.parse(props.value) : {};
  box = marks.box || null;
  strokes = marks.strokes || [];
  fresh = [];
  show();
}

watch("picture", pictureChanged);
watch("method", methodChanged);
watch("value", valueChanged);
new ResizeObserver(show).observe(canvas);
methodChanged();
