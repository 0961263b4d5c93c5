/** What a conversation is asked with. Fields that are left empty are not sent: the server's own defaults hold. */

const NUMBERS = ['temperature', 'top_p', 'max_tokens', 'seed', 'top_k', 'min_p', 'repetition_penalty', 'presence_penalty', 'frequency_penalty'];

/** The settings that a form holds. */
export const readForm = (form) => Object.fromEntries([...new FormData(form)].filter(([, value]) => value !== ''));

export function fillForm(form, settings) {
  for (const field of form.elements) {
    if (field.name) field.value = settings[field.name] ?? (field.tagName === 'SELECT' ? field.options[0].value : '');
  }
}

/** Parts of a request's body. Throws a sentence for people where a setting makes no sense. */
export function parameters(settings) {
  const body = {};
  for (const name of NUMBERS) {
    if (settings[name] !== undefined) body[name] = Number(settings[name]);
  }
  if (settings.stop) body.stop = settings.stop.split('\n').filter(Boolean);
  const tools = toolsOf(settings);
  if (tools.length) body.tools = tools;
  if (settings.format === 'json') body.response_format = { type: 'json_object' };
  if (settings.format === 'schema') {
    const schema = json(settings.schema ?? '', 'The JSON schema');
    body.response_format = { type: 'json_schema', json_schema: { name: 'answer', strict: true, schema } };
  }
  return body;
}

/** The declared tools, as OpenAI frames them; a bare function, or one tool without a list, is fine. */
export function toolsOf(settings) {
  if (!settings.tools?.trim()) return [];
  const list = [json(settings.tools, 'The tool definitions')].flat();
  return list.map((tool) => {
    const whole = tool?.function ? tool : { type: 'function', function: tool };
    if (typeof whole.function?.name !== 'string') throw new Error('Each tool in the settings needs a name.');
    return whole;
  });
}

function json(text, what) {
  try {
    return JSON.parse(text);
  } catch (e) {
    throw new Error(`${what} in the settings: ${e.message}`);
  }
}

/** Small things that outlast the page, where the browser lets us. */
export const kept = {
  get(name) {
    try {
      return JSON.parse(localStorage.getItem(`oxseek.${name}`));
    } catch {
      return null;
    }
  },
  set(name, value) {
    try {
      localStorage.setItem(`oxseek.${name}`, JSON.stringify(value));
    } catch { /* private windows: it lasts as long as the page */ }
  },
};
