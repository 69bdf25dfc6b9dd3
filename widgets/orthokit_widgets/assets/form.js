// Native controls from a description: labels, keyboard and screen readers work as the browser has them.
const WAIT = 70; // ms between two messages of a control that is being dragged
const SETTLE = 1500; // ms in which an answer to an older move does not take a control back

function make(tag, attributes = {}, text = null) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  if (text !== null) node.textContent = text;
  return node;
}

export function render({ model, el }) {
  const id = `f${Math.random().toString(36).slice(2, 9)}`;
  const form = make("form", { "aria-label": model.label });
  form.addEventListener("submit", (event) => event.preventDefault());
  const controls = new Map();
  let touched = null;

  // At most one message per WAIT while dragging; the last position always arrives.
  let timer = null, sent = 0;
  const waiting = new Map();
  function flush() {
    clearTimeout(timer);
    timer = null;
    sent = performance.now();
    for (const [name, value] of waiting) model.send_msg({ set: name, value });
    waiting.clear();
  }
  // What each control last asked for. On a busy server the answer to one key press arrives after the next one; taking
  // it for news would lose the second press.
  const asked = new Map();
  let settling = null;
  function send(name, value, now) {
    waiting.set(name, value);
    asked.set(name, { value: String(value), at: performance.now() });
    clearTimeout(settling);
    settling = setTimeout(update, SETTLE + 50);
    const left = WAIT - (performance.now() - sent);
    if (now || left <= 0) flush();
    else if (timer === null) timer = setTimeout(flush, left);
  }

  const logarithmic = (field) => field.scale === "log";
  const position = (field, value) => (logarithmic(field) ? 200 * Math.log(value / field.min) / Math.log(field.max / field.min) : value);
  function fromPosition(field, at) {
    if (!logarithmic(field)) return Number(at);
    const raw = field.min * (field.max / field.min) ** (at / 200);
    return Math.min(field.max, Math.max(field.min, Number(raw.toPrecision(2))));
  }
  const shown = (field, value) => (logarithmic(field) ? String(Number(Number(value).toPrecision(3))) : Number(value).toFixed(field.digits));

  function range(field, box) {
    const log = logarithmic(field);
    const input = make("input", {
      type: "range", id: `${id}-${field.name}`, name: field.name,
      min: log ? 0 : field.min, max: log ? 200 : field.max, step: log ? 1 : field.step,
      "aria-describedby": field.help ? `${id}-${field.name}-help` : null,
    });
    // Not an <output>: that announces itself, and aria-valuetext already says the same.
    const output = make("span", { class: "value", "aria-hidden": "true" });
    box.append(make("label", { for: input.id }, field.label), output, input);
    const say = (value) => {
      output.textContent = shown(field, value);
      input.setAttribute("aria-valuetext", output.textContent);
    };
    input.addEventListener("input", () => {
      const value = fromPosition(field, input.value);
      touched = field.name;
      say(value);
      send(field.name, value, false);
    });
    input.addEventListener("change", () => {
      touched = null;
      send(field.name, fromPosition(field, input.value), true);
    });
    return { inputs: [input], set: (value) => { if (touched !== field.name) { input.value = position(field, value); say(value); } } };
  }

  function number(field, box) {
    const input = make("input", {
      type: "number", id: `${id}-${field.name}`, name: field.name, min: field.min, max: field.max, step: "any",
      inputmode: "decimal", "aria-describedby": field.help ? `${id}-${field.name}-help` : null,
    });
    box.append(make("label", { for: input.id }, field.label), input);
    // The server judges the value, so that a bad one gets the same sentence as in the address.
    input.addEventListener("change", () => send(field.name, input.value, true));
    return { inputs: [input], set: (value) => { if (el.getRootNode().activeElement !== input || Number(input.value) !== value) input.value = value; } };
  }

  function choice(field, box) {
    const select = make("select", { id: `${id}-${field.name}`, name: field.name, "aria-describedby": field.help ? `${id}-${field.name}-help` : null });
    for (const option of field.choices) select.append(make("option", { value: option.value }, option.label));
    box.append(make("label", { for: select.id }, field.label), select);
    select.addEventListener("change", () => send(field.name, select.value, true));
    return { inputs: [select], set: (value) => { select.value = String(value); } };
  }

  function segments(field, box) {
    const label = make("span", { class: "label", id: `${id}-${field.name}-label` }, field.label);
    const group = make("div", { class: "segments", role: "radiogroup", "aria-labelledby": label.id });
    const inputs = field.choices.map((option) => {
      const part = make("label", { title: option.help });
      const input = make("input", { type: "radio", name: `${id}-${field.name}`, value: option.value });
      input.addEventListener("change", () => send(field.name, option.value, true));
      part.append(input, make("span", {}, option.label));
      group.append(part);
      return input;
    });
    box.append(label, group);
    return { inputs, set: (value) => { for (const input of inputs) input.checked = input.value === String(value); } };
  }

  function several(field, box) {
    const label = make("span", { class: "label", id: `${id}-${field.name}-label` }, field.label);
    const group = make("div", { class: "several", role: "group", "aria-labelledby": label.id });
    const inputs = field.choices.map((option) => {
      const part = make("label");
      const input = make("input", { type: "checkbox", name: `${id}-${field.name}`, value: option.value });
      input.addEventListener("change", () => send(field.name, inputs.filter((each) => each.checked).map((each) => each.value), true));
      part.append(input, make("span", {}, option.label));
      group.append(part);
      return input;
    });
    box.append(label, group);
    return { inputs, set: (value) => { for (const input of inputs) input.checked = value.map(String).includes(input.value); } };
  }

  const kinds = { range, number, choice, segments, several };
  let refusals;
  function build() {
    controls.clear();
    form.replaceChildren();
    if (model.actions.length) form.append(actions);
    for (const field of model.fields) {
      const box = make("div", { class: "field" });
      const control = kinds[field.kind](field, box);
      if (field.help) box.append(make("span", { class: "help", id: `${id}-${field.name}-help` }, field.help));
      controls.set(field.name, { ...control, box });
      form.append(box);
    }
    update();
    enable();
  }
  function update() {
    const refused = model.values[""] !== refusals; // then the control must go back to what holds
    refusals = model.values[""];
    for (const [name, value] of Object.entries(model.values)) {
      const last = asked.get(name);
      const older = last && performance.now() - last.at < SETTLE && last.value !== String(value);
      if (refused || !older) controls.get(name)?.set(value);
    }
  }
  function enable() {
    for (const [name, control] of controls) {
      const off = model.disabled.includes(name);
      control.box.classList.toggle("off", off);
      for (const input of control.inputs) input.disabled = off;
    }
  }

  const actions = make("div", { class: "actions" });
  const buttons = new Map();
  function act() {
    for (const action of model.actions) {
      let button = buttons.get(action.name);
      if (!button) {
        button = make("button", { type: "button" });
        button.addEventListener("click", () => model.send_msg({ action: action.name }));
        buttons.set(action.name, button);
        actions.append(button);
      }
      // A focused button that is switched off would drop the focus to the top of the page.
      if (action.disabled && button.matches(":focus")) {
        button.disabled = true;
        const next = model.actions.find((other) => !other.disabled && buttons.get(other.name));
        if (next) { buttons.get(next.name).disabled = false; buttons.get(next.name).focus(); }
      }
      button.disabled = action.disabled;
      button.className = action.primary ? "primary" : "";
      button.textContent = action.label;
    }
  }

  build();
  act();
  el.append(form);
  model.on("fields", build);
  model.on("values", update);
  model.on("disabled", enable);
  model.on("actions", act);
  // In a notebook, what the server sent before its channel to this page stood is lost: ask until an answer comes.
  let tries = 0;
  const ask = () => {
    if (model.answered || tries++ > 60) return;
    model.send_msg({ ready: true });
    setTimeout(ask, 500);
  };
  ask();
}
