// The search page. Texts from the index are only ever set as text, never as markup.

const $ = (selector, root = document) => root.querySelector(selector);
const form = $("#form"), query = $("#query"), order = $("#order"), file = $("#file"), status = $("#status");
const results = $("#results"), heading = $("#heading"), asked = $("#asked"), welcome = $("#welcome"), viewer = $("#viewer");
let about = null, current = 0, shown = null;
const regions = new Map(); // of images by row, as they were asked for

// Without control, format and direction characters, which could disguise what is shown.
const plain = (text) => text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}]/gu, "");

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = plain(text);
  return made;
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer.");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error ? `${answer.error[0].toUpperCase()}${answer.error.slice(1)}.` : `The server answered ${response.status}.`);
  return answer;
}

// Runs one request at a time as far as the page is concerned: a later one makes an earlier one's answer void.
async function busy(work) {
  const mine = ++current;
  document.body.classList.add("busy");
  say("");
  try {
    const show = await work();
    if (mine === current) show();
  } catch (error) {
    if (mine === current) say(error.message, true);
  } finally {
    if (mine === current) document.body.classList.remove("busy");
  }
}

function say(text, wrong = false) {
  status.textContent = plain(text);
  status.classList.toggle("wrong", wrong);
}

function clear() {
  results.replaceChildren();
  heading.hidden = asked.hidden = welcome.hidden = true;
}

const scoreOf = (item) => item.both_stages ?? item.second_stage ?? item.first_stage ?? item.cosine;

function scoreTitle(item) {
  const names = { both_stages: "both stages", second_stage: "a close look", first_stage: "vectors", cosine: "cosine of vectors" };
  return Object.entries(names).filter(([key]) => key in item).map(([key, name]) => `${name} ${item[key].toFixed(3)}`).join(" · ");
}

function usedScore(item, by) {
  return by === "second" && "second_stage" in item ? item.second_stage : by === "first" && "first_stage" in item ? item.first_stage : scoreOf(item);
}

function boxes(frame, list, labels) {
  frame.querySelectorAll(".box").forEach((box) => box.remove());
  for (const box of list) {
    const made = element("div", box.sure ? "box" : "box unsure");
    for (const side of ["left", "top", "width", "height"]) made.style[side] = `${box[side]}%`;
    made.style.setProperty("--colour", box.colour);
    if (labels) made.title = plain(box.label);
    if (box.sure) made.append(element("span", `${box.top > 8 ? "above" : "inside"}${box.left > 60 ? " leftwards" : ""}`, box.label));
    frame.append(made);
  }
}

async function regionsOf(row) {
  if (!regions.has(row)) regions.set(row, ask(`api/images/${row}`).catch((error) => { regions.delete(row); throw error; }));
  return regions.get(row);
}

function picture(stage, source, text) {
  const frame = element("div", "frame"), image = element("img");
  image.alt = plain(text);
  image.decoding = "async";
  image.addEventListener("load", () => stage.style.setProperty("--aspect", `${image.naturalWidth / image.naturalHeight}`));
  image.addEventListener("error", () => stage.classList.add("gone"));
  image.src = source;
  frame.append(image);
  stage.classList.remove("gone");
  stage.replaceChildren(frame);
  return frame;
}

function card(item, by) {
  const caption = plain(item.captions[0] ?? item.image_id);
  const figure = element("figure", "card"), open = element("button", "open"), stage = element("div", "stage");
  open.type = "button";
  open.setAttribute("aria-label", `Open: ${caption}`);
  const frame = picture(stage, `images/${item.row}?size=small`, caption);
  $("img", frame).loading = "lazy";
  open.append(stage);
  open.addEventListener("click", () => look(item));

  const fetchBoxes = () => regionsOf(item.row).then((found) => boxes(frame, found.boxes, false), () => {});
  figure.addEventListener("pointerenter", fetchBoxes, { once: true });
  figure.addEventListener("focusin", fetchBoxes, { once: true });

  const words = element("figcaption"), foot = element("div", "foot"), score = element("span", "score");
  const text = element("p", "", caption);
  text.title = item.captions.map(plain).join("\n");
  score.append(element("b", "", String(item.rank)), ` · ${usedScore(item, by).toFixed(2)}`);
  score.title = scoreTitle(item);
  const similar = element("button", "", "Similar");
  similar.type = "button";
  similar.setAttribute("aria-label", `Pictures similar to: ${caption}`);
  similar.addEventListener("click", () => go({ similar: item.row }));
  foot.append(score, similar);
  words.append(text, foot);
  figure.append(open, words);
  return figure;
}

function show(items, by) {
  results.replaceChildren(...items.map((item) => card(item, by)));
}

async function look(item) {
  const stage = $(".stage", viewer), captions = $(".captions", viewer);
  shown = item.row;
  const frame = picture(stage, `images/${item.row}?size=large`, item.captions[0] ?? item.image_id);
  captions.replaceChildren(...item.captions.map((text) => element("p", "", text)));
  $(".facts", viewer).textContent = [plain(item.image_id), scoreTitle(item)].filter(Boolean).join(" · ");
  viewer.showModal();
  try {
    const found = await regionsOf(item.row);
    if (shown !== item.row) return;
    boxes(frame, found.boxes, true);
    $(".facts", viewer).textContent = [plain(item.image_id), `${found.width} × ${found.height} pixels, ${found.boxes.length} regions`, scoreTitle(item)].filter(Boolean).join(" · ");
  } catch (error) {
    $(".facts", viewer).textContent = error.message;
  }
}

const number = new Intl.NumberFormat("en");
const spent = (milliseconds) => `${number.format(Math.round(Object.values(milliseconds).reduce((a, b) => a + b, 0)))} ms`;

function looked(by, answer, count, what) {
  const closely = by === "first" ? "by their vectors" : `the nearest ${number.format(Math.min(count, about?.candidates ?? count))} looked at closely`;
  return [`${number.format(count)} ${what}, ${closely}`, spent(answer.milliseconds), ...answer.notes].join(" · ");
}

function searchText(text) {
  busy(async () => {
    const answer = await ask(`api/search?${new URLSearchParams({ q: text, order: order.value })}`);
    return () => {
      clear();
      show(answer.images, answer.order);
      say(looked(answer.order, answer, about?.images ?? answer.images.length, "pictures"));
    };
  });
}

function searchSimilar(row) {
  busy(async () => {
    const [answer, image] = await Promise.all([ask(`api/images/${row}/similar`), regionsOf(row)]);
    return () => {
      clear();
      heading.textContent = `Similar to “${plain(image.captions[0] ?? image.image_id)}”`;
      heading.hidden = false;
      show(answer.similar, "cosine");
      say(`${number.format(about?.images ?? answer.similar.length)} pictures by their vectors · ${spent(answer.milliseconds)}`);
    };
  });
}

function searchPhoto(photo) {
  if (about && !about.photos) return say(`${about.photos_note}.`, true);
  if (about && photo.size > about.limits.photo_bytes) return say(`The photo is larger than ${Math.round(about.limits.photo_bytes / 2 ** 20)} MB.`, true);
  busy(async () => {
    const answer = await ask(`api/photo?${new URLSearchParams({ order: order.value })}`, { method: "POST", body: photo, headers: { "content-type": "application/octet-stream" } });
    return () => {
      clear();
      query.value = "";
      history.pushState({}, "", "./");
      const address = URL.createObjectURL(photo), stage = $(".stage", asked);
      const frame = picture(stage, address, "the photo that is searched by");
      $("img", frame).addEventListener("load", () => URL.revokeObjectURL(address));
      boxes(frame, answer.boxes, true);
      $("ol", asked).replaceChildren(...answer.captions.map((item) => {
        const line = element("li"), score = element("span", "score", usedScore(item, answer.order).toFixed(2));
        score.title = scoreTitle(item);
        line.append(element("span", "", item.caption), score);
        return line;
      }));
      asked.hidden = false;
      heading.textContent = "Similar pictures";
      heading.hidden = false;
      show(answer.similar, "cosine");
      say(looked(answer.order, answer, about?.captions ?? answer.captions.length, "captions"));
    };
  });
}

// What is asked for stands in the address, so that back, forward and bookmarks work.
function go(wanted) {
  if (viewer.open) viewer.close();
  const parameters = new URLSearchParams(wanted);
  if (order.value !== about?.order && !("similar" in wanted)) parameters.set("order", order.value);
  history.pushState({}, "", `?${parameters}`);
  follow();
}

function follow() {
  const parameters = new URLSearchParams(location.search);
  const text = parameters.get("q") ?? "", row = parameters.get("similar");
  if (parameters.has("order")) order.value = parameters.get("order");
  query.value = text;
  window.scrollTo(0, 0);
  if (text) searchText(text);
  else if (row !== null && /^\d+$/.test(row)) searchSimilar(Number(row));
  else {
    current++;
    document.body.classList.remove("busy");
    clear();
    say("");
    welcome.hidden = false;
    if (!matchMedia("(pointer: coarse)").matches) query.focus();
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = query.value.trim();
  if (!text) return;
  if (matchMedia("(pointer: coarse)").matches) query.blur(); // so that the keyboard goes
  go({ q: text });
});
order.addEventListener("change", () => query.value.trim() && go({ q: query.value.trim() }));
file.addEventListener("change", () => { if (file.files[0]) searchPhoto(file.files[0]); file.value = ""; });
$("#pick").addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); file.click(); } });
$("#home").addEventListener("click", (event) => { event.preventDefault(); history.pushState({}, "", "./"); follow(); });
window.addEventListener("popstate", follow);

$(".close", viewer).addEventListener("click", () => viewer.close());
viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
viewer.addEventListener("close", () => { shown = null; });
$(".similar", viewer).addEventListener("click", () => go({ similar: shown }));
$(".regions", viewer).addEventListener("click", (event) => {
  const plain = $(".stage", viewer).classList.toggle("plain");
  event.currentTarget.setAttribute("aria-pressed", String(!plain));
});

const photoIn = (transfer) => [...(transfer?.files ?? [])].find((each) => each.type.startsWith("image/")) ?? transfer?.files?.[0];
let depth = 0;
addEventListener("dragenter", (event) => { if (event.dataTransfer?.types.includes("Files")) { depth++; $("#drop").hidden = !about?.photos; } });
addEventListener("dragleave", () => { if (--depth <= 0) { depth = 0; $("#drop").hidden = true; } });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  $("#drop").hidden = true;
  const photo = photoIn(event.dataTransfer);
  if (photo) searchPhoto(photo);
});
addEventListener("paste", (event) => { const photo = photoIn(event.clipboardData); if (photo) { event.preventDefault(); searchPhoto(photo); } });
addEventListener("keydown", (event) => {
  const typing = event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement;
  if (event.key === "/" && !typing && !viewer.open) { event.preventDefault(); query.focus(); query.select(); }
  const cards = [...results.querySelectorAll(".open")], at = cards.indexOf(document.activeElement);
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step && at >= 0 && !viewer.open) cards[at + step]?.focus();
});

async function begin() {
  try {
    about = await ask("api/about");
  } catch (error) {
    return say(error.message, true);
  }
  document.title = about.title;
  $("#home").textContent = about.title;
  order.value = about.order;
  $("#pick").hidden = $(".tip", welcome).hidden = !about.photos;
  $(".lead", welcome).textContent = `${number.format(about.images)} pictures. Describe one, and see what is found.`;
  $(".examples", welcome).replaceChildren(...about.examples.map(({ text, row }) => {
    const button = element("button"), image = element("img");
    button.type = "button";
    image.alt = "";
    image.src = `images/${row}?size=small`;
    button.append(image, element("span", "", text));
    button.addEventListener("click", () => go({ q: text }));
    return button;
  }));
  follow();
}

begin();
