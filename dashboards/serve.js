"use strict";
// Asks the server that sent this page for images, of the student first and then of the teacher, and of nobody else.
const at = id => document.getElementById(id);
let models = [];

// A new element; strings become text, never markup.
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

async function ask(path, body) {
  const headers = {};
  if (at("token").value) headers.Authorization = "Bearer " + at("token").value;
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  let found = null;
  try { found = await answer.json(); } catch { /* an answer of Ray Serve's own is text */ }
  if (answer.ok && found) return found;
  const error = new Error((found && found.error && found.error.message) || "the server answers " + answer.status);
  error.status = answer.status;
  throw error;
}

function complain(error) {
  at("error").textContent = error ? error.message : "";
  at("error").hidden = !error;
}

async function load() {
  try {
    models = (await ask("/v1/models")).data;
  } catch (error) {
    if (error.status !== 401) { complain(error); return; }
    const given = at("token").value;
    at("token-field").hidden = false;
    at("token").focus();
    complain(given ? error : null);
    at("status").textContent = "This server asks for a token.";
    return;
  }
  const first = models[0], asked = !at("token-field").hidden;
  at("token-field").hidden = true;
  at("class-field").hidden = first.takes !== "class";
  at("text-field").hidden = first.takes !== "text";
  at("text").required = first.takes === "text";
  at("count").max = first.images;
  at("count").value = Math.min(8, first.images);
  at("class").replaceChildren(...Array.from({ length: first.classes || 0 }, (_, i) =>
    make("option", { value: i }, first.class_names[i] ? i + "  " + first.class_names[i] : String(i))));
  at("facts").replaceChildren(...models.map(model =>
    make("div", {}, make("dt", {}, model.role), make("dd", {}, describe(model)))));
  at("drawn").className = models.length > 1 ? "" : "alone";
  at("status").textContent = "";
  if (asked) at({ class: "class", text: "text", nothing: "count" }[first.takes]).focus();
}

const many = (n, what) => n + " " + what + (n === 1 ? "" : "s");
const describe = model => model.id + ": " + model.sampler + ", " + many(model.calls, "network call") + " an image, " + model.size;
const time = seconds => seconds < 1 ? Math.round(1000 * seconds) + " ms" : seconds.toFixed(1) + " s";

function figure(model, answer, what) {
  const [width] = model.size.split("x").map(Number);
  const images = answer.data.map((image, i) =>
    make("img", { src: "data:image/png;base64," + image.b64_json, alt: `${model.role}: ${what}, image ${i + 1}`, width }));
  const kind = width <= 64 ? "small" : width >= 256 ? "large" : "";
  return make("figure", { "data-role": model.role },
    make("figcaption", {}, make("b", {}, model.role),
      make("span", {}, many(images.length, "image") + " in " + time(answer.seconds) + ", " + many(model.calls, "network call") + " each")),
    make("div", { class: "images " + kind }, ...images));
}

async function draw(event) {
  event.preventDefault();
  complain(null);
  if (!models.length) { await load(); return; }
  const takes = models[0].takes, chosen = at("class").selectedOptions[0];
  const prompt = takes === "class" ? at("class").value : takes === "text" ? at("text").value : "";
  const what = takes === "class" ? chosen.textContent : prompt;
  at("draw").disabled = true;
  at("drawn").replaceChildren();
  const seconds = [];
  try {
    for (const model of models) {
      at("status").textContent = "The " + model.role + " draws …";
      const body = { model: model.id, prompt, n: Number(at("count").value), seed: Number(at("seed").value), response_format: "b64_json" };
      const answer = await ask("/v1/images/generations", body);
      seconds.push(answer.seconds);
      at("drawn").append(figure(model, answer, what));
    }
    const faster = seconds.length > 1 ? seconds[1] / seconds[0] : 0;
    at("status").textContent = faster > 1
      ? `The student was ${faster < 10 ? faster.toFixed(1) : Math.round(faster)} times as fast as the teacher, from the same noise.`
      : many(Number(at("count").value), "image") + " drawn.";
  } catch (error) {
    at("status").textContent = "";
    complain(error);
  } finally {
    at("draw").disabled = false;
    at("draw").focus();
  }
}

at("form").addEventListener("submit", draw);
load();
