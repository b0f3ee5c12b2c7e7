// The page: a form whose fields are named as those of the API, a stream of events, and the history.

const $ = (id) => document.getElementById(id);
const form = $("form");
const jobs = new Map(); // the jobs that wait or run, by id
const PAGE = 60; // images of the history that are asked for at once
let session, entries = [], shown = null, source = null; // shown: of the viewer; source: id of the image to start from

// Requests.

async function api(path, options = {}) {
  const answer = await fetch(path, options);
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

const post = (path, body, headers = {}) =>
  api(path, { method: "POST", body, headers: { "x-ldm-token": session.token, ...headers } });
const postJSON = (path, values) => post(path, JSON.stringify(values), { "content-type": "application/json" });

function upload(blob, kind = "image") {
  const data = new FormData();
  data.append("file", blob, "image.png");
  data.append("kind", kind);
  return post("/api/uploads", data);
}

const say = (text) => { $("message").textContent = text; };
const quietly = (action) => async (...args) => { // leaves messages of before alone
  try { await action(...args); } catch (error) { say(error.message); }
};
const reported = (action) => (...args) => { say(""); return quietly(action)(...args); };

// The form. A field named a.b is b of a, and numbers in a name are places in a list.

const fields = () => [...form.elements].filter((field) => field.name);

function collect() {
  const values = {};
  for (const field of fields()) {
    if (field.type === "checkbox" ? !field.checked : field.value.trim() === "") continue;
    const path = field.name.split("."), last = path.pop();
    const inner = path.reduce((values, name) => (values[name] ??= {}), values);
    inner[last] = field.type === "checkbox" || (field.type === "number" ? Number(field.value) : field.value);
  }
  for (const name of ["x", "y"]) {
    if (!values[name]?.setting) delete values[name];
    else values[name].values = (values[name].values ?? "").split(";").map((value) => value.trim()).filter(Boolean);
  }
  if (values.outpaint) values.outpaint = [0, 1, 2, 3].map((edge) => values.outpaint[edge] ?? 0);
  if (values.guidance?.interval) values.guidance.interval = [0, 1].map((end) => values.guidance.interval[end] ?? end);
  if (!$("keep-seed").checked) delete values.seed;
  if (!source) for (const name of ["strength", "inversion_prompt", "outpaint"]) delete values[name];
  return values;
}

async function apply(values) {
  for (const field of fields()) {
    const value = field.name.split(".").reduce((inner, name) => inner?.[name], values);
    if (field.type === "checkbox") field.checked = value === true;
    else if (field.name.endsWith(".values")) field.value = value?.join("; ") ?? "";
    else if (field.name !== "model" || session.models.some((model) => model.name === value)) field.value = value ?? "";
  }
  $("keep-seed").checked = values.seed != null;
  if (values.model && form.elements.model.value !== values.model) {
    say(`model ${values.model} is not here: ${form.elements.model.value} is chosen`);
  }
  removeSource();
  if (values.image) await setSource(values.image, values.mask);
  showDefaults();
  save();
}

// What a refresh brings back, the mask as it is painted.
function save() {
  const mask = source && isPainted() ? $("mask").toDataURL() : null;
  sessionStorage.setItem("form", JSON.stringify({ ...collect(), image: source, mask }));
}

function showDefaults() {
  const model = session?.models.find((model) => model.name === form.elements.model.value) ?? {};
  form.elements.steps.placeholder = model.steps ?? "30";
  form.elements.guidance_scale.placeholder = model.guidance_scale ?? "7.5";
  for (const name of ["width", "height"]) form.elements[name].placeholder = model.resolution ?? "the model's own";
}

function fill(select, values, none) {
  select.replaceChildren(...(none === undefined ? [] : [new Option(none, "")]), ...values.map((v) => new Option(v, v)));
}

const submit = reported(async () => {
  const wrong = fields().find((field) => field.validity.badInput);
  if (wrong) throw new Error(`${wrong.name}: write a number`);
  const values = collect();
  if (source) values.image = source;
  if (source && isPainted()) values.mask = (await upload(await maskBlob(), "mask")).id;
  const job = await postJSON("/api/jobs", values);
  form.elements.seed.value = job.request.seed;
  save();
});

// Jobs: each event is one, as it is now.

let events = null, retry = null;

function listen() {
  events?.close();
  events = new EventSource("/api/events?interval=0.1"); // steps can be faster than a screen
  events.onopen = async () => {
    const before = [...jobs.keys()]; // of which some have ended meanwhile
    jobs.clear();
    showJobs();
    await quietly(showNewest)();
    for (const id of before) api(`/api/jobs/${id}`).then(onJob, () => {}); // none: the server is another one
  };
  events.onmessage = (event) => onJob(JSON.parse(event.data));
  events.onerror = () => {
    $("status").textContent = "The server does not answer. Trying again…";
    events.close();
    clearTimeout(retry);
    retry = setTimeout(start, 3000); // from the beginning, as it may be another one by then, with another token
  };
}

const hasEnded = (job) => ["finished", "stopped", "failed"].includes(job.state);

function onJob(job) {
  const before = jobs.get(job.id), made = job.images;
  if (hasEnded(job)) jobs.delete(job.id);
  else jobs.set(job.id, job);
  if (job.error) say(job.error);
  if (hasEnded(job) || made.length > (before?.images.length ?? 0)) quietly(showNewest)();
  if (hasEnded(job) && made.length) {
    const shown = job.request.x || job.request.y ? made.slice(-1) : made;
    showImages(shown.map((id) => `/api/images/${id}/file`), job.request.prompt);
    showCaption(job);
  }
  showJobs();
}

const showCaption = (job) => { $("caption").textContent = job.warnings.join(" · ") || job.request.prompt; };

function showImages(addresses, prompt) {
  const images = [...$("stage").querySelectorAll("img")];
  while (images.length < addresses.length) images.push(new Image());
  images.length = addresses.length;
  images.forEach((image, i) => {
    if (image.getAttribute("src") !== addresses[i]) image.src = addresses[i];
    image.alt = prompt;
  });
  sync($("stage"), images);
}

// Make these the children of an element; those that are there already keep the focus and the pointer.
function sync(parent, children) {
  children.forEach((child, i) => {
    if (parent.children[i] !== child) parent.insertBefore(child, parent.children[i] ?? null);
  });
  while (parent.children.length > children.length) parent.lastElementChild.remove();
}

// An element for each key, made once.
function cached(make) {
  const made = new Map();
  return (key, ...args) => made.get(key) ?? made.set(key, make(key, ...args)).get(key);
}

const current = () => [...jobs.values()].find((job) => job.state !== "queued");

function showJobs() {
  const job = current(), waiting = [...jobs.values()].filter((job) => job.state === "queued");
  $("stop").disabled = $("skip").disabled = !job;
  const states = { loading: "Loading the model…", sampling: "Sampling" };
  $("status").textContent = job ? states[job.state] : waiting.length ? states.loading : "Ready";
  $("progress").value = job?.steps ? job.step / job.steps : 0;
  const left = job?.seconds_left == null ? "" : `, ${formatTime(job.seconds_left)} left`;
  const isLoading = job ? !job.steps : waiting.length > 0;
  $("time").textContent = job?.steps ? `Step ${job.step} of ${job.steps}${left}` : isLoading ? states.loading : "";
  if (job?.preview) {
    showImages([job.preview], job.request.prompt);
    showCaption(job);
  }
  waiting.sort((a, b) => a.number - b.number);
  sync($("queue"), waiting.map((job) => queueItem(job.id, job)));
}

const queueItem = cached((id, job) => {
  const item = document.createElement("li"), button = document.createElement("button");
  item.textContent = job.request.prompt;
  button.type = "button";
  button.textContent = "Cancel";
  button.onclick = reported(() => postJSON(`/api/jobs/${id}/stop`, {}));
  item.append(button);
  return item;
});

const formatTime = (seconds) => seconds < 60 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`;
const ask = (wish) => reported(async () => { if (current()) await postJSON(`/api/jobs/${current().id}/${wish}`, {}); });

// The history, by day.

// A gap that more new images than a page have left is not filled: what was before it is asked for again.
async function showNewest() {
  const newest = await api(`/api/images?limit=${PAGE}`);
  const isConnected = newest.some((entry) => entryOf(entry.id));
  if (!isConnected) $("more").hidden = newest.length < PAGE;
  showHistory(isConnected ? [...newest, ...entries] : newest);
}

async function showOlder() {
  const older = await api(`/api/images?limit=${PAGE}&before=${entries.at(-1).id}`);
  $("more").hidden = older.length < PAGE;
  showHistory([...entries, ...older]);
}

function showHistory(found) { // of an image that is there twice, the first is newer
  const unique = new Map(found.toReversed().map((entry) => [entry.id, entry]));
  entries = [...unique.values()].sort((a, b) => a.id < b.id ? 1 : -1);
  const dayOf = (entry) => new Date(entry.created).toLocaleDateString(undefined, { dateStyle: "full" });
  const days = Map.groupBy(entries, dayOf);
  sync($("history"), [...days].map(([day, entries]) => {
    const section = daySection(day);
    sync(section.lastElementChild, entries.map((entry) => thumbnail(entry.id)));
    return section;
  }));
  if (shown) {
    shown = entryOf(shown.id) ?? shown;
    $("denoising").hidden = !shown.film_steps; // which may just have been made
  }
}

const daySection = cached((day) => {
  const section = document.createElement("section"), heading = document.createElement("h2");
  const images = document.createElement("div");
  heading.textContent = day;
  images.className = "day";
  section.append(heading, images);
  return section;
});

const thumbnail = cached((id) => {
  const button = document.createElement("button"), image = new Image();
  button.type = "button";
  button.title = image.alt = entryOf(id).settings.prompt;
  image.loading = "lazy";
  image.src = `/api/images/${id}/thumbnail`;
  button.append(image);
  button.onclick = () => view(entryOf(id));
  return button;
});

const entryOf = (id) => entries.find((entry) => entry.id === id);

// The viewer: an image, how it was made, and its film.

function view(entry) {
  shown = entry;
  $("large").src = $("download").href = `/api/images/${entry.id}/file`;
  $("large").alt = entry.settings.prompt;
  $("download").download = `${entry.id}.png`;
  $("film").hidden = true;
  $("large").hidden = false;
  $("denoising").hidden = !entry.film_steps;
  $("vary").hidden = entry.kind !== "image" || entry.settings.inversion_prompt != null;
  const made = { created: new Date(entry.created).toLocaleString(), size: `${entry.width} × ${entry.height}`,
    ...(entry.stopped_after && { stopped: `after step ${entry.stopped_after}` }), ...entry.settings };
  $("made").replaceChildren(...flatten(made).flatMap(([name, value]) => {
    const term = document.createElement("dt"), description = document.createElement("dd");
    term.textContent = name.replaceAll("_", " ");
    description.textContent = value;
    return [term, description];
  }));
  $("viewer").showModal();
}

const flatten = (values, prefix = "") => Object.entries(values).flatMap(([name, value]) => {
  const isUnset = value === null || value === "" || value === false || value === 0 && prefix !== "";
  if (isUnset || Array.isArray(value) && value.every((item) => !item)) return [];
  if (Array.isArray(value)) return [[prefix + name, value.join(", ")]];
  return typeof value === "object" ? flatten(value, `${prefix}${name} `) : [[prefix + name, value]];
});

let film = null, playing = null;

function openFilm() {
  const entry = shown;
  film = new Image();
  film.onload = () => {
    if (shown.id !== entry.id) return; // another one was opened meanwhile
    const width = film.width / shown.film_steps, height = film.height / 2;
    for (const id of ["state", "guess"]) Object.assign($(id), { width, height });
    $("film").hidden = false;
    $("large").hidden = true;
    $("film-slider").max = $("film-slider").value = shown.film_steps;
    showFrame();
  };
  film.src = `/api/images/${shown.id}/film`;
}

function showFrame() {
  const step = Number($("film-slider").value);
  ["state", "guess"].forEach((id, row) => {
    const canvas = $(id), { width, height } = canvas;
    canvas.getContext("2d").drawImage(film, (step - 1) * width, row * height, width, height, 0, 0, width, height);
  });
  $("film-step").textContent = `After step ${step} of ${shown.film_steps}`;
}

function play() {
  clearInterval(playing);
  $("film-slider").value = 1;
  showFrame();
  playing = setInterval(() => {
    $("film-slider").stepUp();
    showFrame();
    if ($("film-slider").value === $("film-slider").max) clearInterval(playing);
  }, 150);
}

// The image to start from, and the mask that is painted on it.

const brush = { x: 0, y: 0 };
const pen = () => $("mask").getContext("2d", { willReadFrequently: true });

async function setSource(id, mask) {
  const address = id.length === 64 ? `/api/uploads/${id}` : `/api/images/${id}/file`; // a hash, or of the history
  $("source").src = address;
  await $("source").decode().catch(() => {
    removeSource();
    throw new Error("the image to start from is gone: add it again");
  });
  source = id;
  const { naturalWidth: width, naturalHeight: height } = $("source");
  Object.assign($("mask"), { width, height });
  Object.assign(brush, { x: width / 2, y: height / 2 });
  $("painting").hidden = false;
  $("start").open = true;
  if (mask) {
    const image = new Image();
    image.src = mask.startsWith("data:") ? mask : `/api/uploads/${mask}`;
    await image.decode();
    pen().drawImage(image, 0, 0);
    const pixels = pen().getImageData(0, 0, width, height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      pixels.data.set(pixels.data[i] > 127 ? [255, 0, 90, 255] : [0, 0, 0, 0], i);
    }
    pen().putImageData(pixels, 0, 0);
  }
}

function removeSource() {
  source = null;
  $("painting").hidden = true;
  $("file").value = "";
}

const isPainted = () =>
  pen().getImageData(0, 0, $("mask").width, $("mask").height).data.some((value, i) => i % 4 === 3 && value > 127);

function maskBlob() { // white where painted, black elsewhere
  const canvas = document.createElement("canvas"), { width, height } = $("mask");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d"), pixels = pen().getImageData(0, 0, width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const shade = pixels.data[i + 3] > 127 ? 255 : 0;
    pixels.data.set([shade, shade, shade, 255], i);
  }
  context.putImageData(pixels, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

const radius = () => $("brush-size").value / 200 * Math.max($("mask").width, $("mask").height);

function moveBrush(x, y, paints) {
  const context = pen();
  if (paints) {
    context.globalCompositeOperation = $("erase").checked ? "destination-out" : "source-over";
    context.strokeStyle = "rgb(255 0 90)";
    context.lineCap = "round";
    context.lineWidth = 2 * radius();
    context.beginPath();
    context.moveTo(brush.x, brush.y);
    context.lineTo(x, y);
    context.stroke();
  }
  Object.assign(brush, { x, y });
  const scale = $("mask").clientWidth / $("mask").width, size = `${2 * radius() * scale}px`;
  Object.assign($("brush").style, { left: `${x * scale}px`, top: `${y * scale}px`, width: size, height: size });
  $("brush").hidden = false;
}

function onPointer(event) {
  const scale = $("mask").width / $("mask").clientWidth;
  const [x, y] = [event.offsetX * scale, event.offsetY * scale];
  if (event.type === "pointerdown") {
    $("mask").setPointerCapture(event.pointerId);
    Object.assign(brush, { x, y });
  }
  moveBrush(x, y, event.buttons & 1);
}

function onKey(event) {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] };
  if (!(event.key in moves)) return;
  const [dx, dy] = moves[event.key];
  event.preventDefault();
  const clamp = (value, top) => Math.min(Math.max(value, 0), top);
  const { width, height } = $("mask");
  const x = clamp(brush.x + dx * radius(), width), y = clamp(brush.y + dy * radius(), height);
  moveBrush(x, y, event.key === " " || event.shiftKey);
}

// A file that was chosen or dropped: its settings, or else, or where it is to start from, the image.
const open = reported(async (file, startsFrom) => {
  if (!file) return;
  const uploaded = await upload(file);
  if (uploaded.settings && !startsFrom) {
    await apply(uploaded.settings);
    say(uploaded.notes.join("\n"));
  } else {
    await setSource(uploaded.id);
    save();
    if (!startsFrom) say(uploaded.notes.join("\n"));
  }
});

// What the buttons do.

form.onsubmit = (event) => { event.preventDefault(); submit(); };
form.onkeydown = (event) => {
  if (event.key !== "Enter" || !event.ctrlKey) return;
  event.preventDefault();
  form.requestSubmit();
};
form.onchange = () => { showDefaults(); save(); };
$("stop").onclick = ask("stop");
$("skip").onclick = ask("skip");
$("reset").onclick = reported(() => apply(
  { num_images: 1, model: session.models[0]?.name, sampler: "dpmpp_2m", guidance: { method: "cfg" } },
));
$("more").onclick = reported(showOlder);
$("file").onchange = () => open($("file").files[0], true);
$("settings-file").onchange = () => open($("settings-file").files[0], false);
$("remove").onclick = () => { removeSource(); save(); };
$("clear-mask").onclick = () => { pen().clearRect(0, 0, $("mask").width, $("mask").height); save(); };
$("mask").onpointerup = $("mask").onkeyup = save;
for (const type of ["pointerdown", "pointermove"]) $("mask").addEventListener(type, onPointer);
$("mask").onkeydown = onKey;
$("mask").onfocus = () => moveBrush(brush.x, brush.y, false);
$("mask").onblur = $("mask").onpointerleave = () => { $("brush").hidden = true; };
document.ondragover = (event) => { if (event.dataTransfer.types.includes("Files")) event.preventDefault(); };
document.ondrop = (event) => {
  if (!event.dataTransfer.types.includes("Files")) return; // text, into a field
  event.preventDefault();
  open(event.dataTransfer.files[0], event.target.closest("#start") !== null);
};
document.onvisibilitychange = () => document.hidden ? events?.close() : listen(); // a browser has few connections
$("close").onclick = () => $("viewer").close();
$("viewer").onclose = () => clearInterval(playing);
$("use").onclick = reported(async () => { $("viewer").close(); await apply(shown.settings); });
$("from").onclick = reported(async () => { $("viewer").close(); await setSource(shown.id); save(); });
$("vary").onclick = reported(async () => {
  $("viewer").close();
  const values = [1, 2, 3, 4].map(() => Math.floor(Math.random() * 2 ** 32));
  await postJSON("/api/jobs", { ...shown.settings, variation_strength: 0.3, x: { setting: "variation_seed", values } });
});
$("denoising").onclick = openFilm;
$("film-slider").oninput = showFrame;
$("play").onclick = play;

const start = quietly(async () => {
  const isFirst = !session;
  try {
    session = await api("/api/session");
  } catch (error) {
    setTimeout(start, 3000);
    throw error;
  }
  listen();
  if (!isFirst) return;
  fill(form.elements.model, session.models.map((model) => model.name));
  fill(form.elements.sampler, session.samplers);
  form.elements.sampler.value = "dpmpp_2m";
  $("schedules").replaceChildren(...session.schedules.map((name) => new Option(name)));
  for (const axis of ["x", "y"]) fill(form.elements[`${axis}.setting`], session.axes, "none");
  showDefaults();
  const saved = sessionStorage.getItem("form");
  if (saved) await apply(JSON.parse(saved));
});
start();
